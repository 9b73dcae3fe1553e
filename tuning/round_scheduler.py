"""Owns early stopping in rounds: trials are compared once, at the same step, and the best of a round go on.

Successive halving with a single halving, behind Ray's interface. A trial that waits for its round is paused:
its seat on the GPU is given back, and it goes on from its checkpoint exactly where it stood. What is decided
of a round depends on its trials' scores alone, so that a sweep that goes on decides the same.
Source: https://proceedings.mlr.press/v51/jamieson16.html
"""

import math
from collections.abc import Sequence
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from tuning.ledger import TrialRecord
from tuning.objective import score_of
from tuning.strategy import Rounds


class RoundScheduler(TrialScheduler):
    """Pauses each trial at the rounds' step, and lets the best of a round train on.

    `records`: of the trials that began before. `num_devices`: that many rounds are under way at once.
    waiting: ids of the trials that are paused until their round is decided. ended_by_hand: of those that
    people want stopped.
    """

    def __init__(self, rounds: Rounds, records: Sequence[TrialRecord], num_trials: int, num_devices: int):
        super().__init__()
        self._rounds, self._num_trials, self._num_devices = rounds, num_trials, num_devices
        self._trials = dict[int, Any]()
        self._values = dict[int, float]()  # by a trial's number: its score where it is compared
        self._ended = set[int]()
        self.waiting, self.ended_by_hand = set[str](), set[str]()
        for record in records:
            number = _number(record.trial_id)
            point = next((point for point in record.curve if self._is_compared(point)), None)
            if point is not None:
                self._values[number] = score_of(point)
            if record.has_ended:
                self._values.setdefault(number, math.inf)
                self._ended.add(number)

    def may_begin(self, number: int) -> bool:
        """Tell whether a trial may begin now: rounds are filled, and a new one needs a device without one."""
        of_round, place = divmod(number, self._rounds.trials)
        return place > 0 or sum(not self._is_over(one) for one in range(of_round)) < self._num_devices

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take in a trial; one that has been compared before waits for what is decided of its round.

        One that failed and is tried again is added again, as pending: if it goes on, it stays that.
        """
        number = _number(trial.trial_id)
        is_again = number in self._trials
        self._trials[number] = trial
        if number not in self._values:
            return
        if is_again:
            if number not in (self._kept(number // self._rounds.trials) or ()):
                tune_controller._set_trial_status(trial, Trial.PAUSED)
        else:
            trial.init_local_path()  # which Ray asks for even if it stops the trial before it runs here
            trial.set_status(Trial.PAUSED)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Pause a trial where it is compared."""
        number = _number(trial.trial_id)
        self.waiting.discard(trial.trial_id)
        if not math.isfinite(score_of(result)):
            self._values.setdefault(number, math.inf)
        elif number not in self._values and self._is_compared(result):
            self._values[number] = score_of(result)
            if result["schedule_percent"] < 100:
                self.waiting.add(trial.trial_id)
                return str(TrialScheduler.PAUSE)
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Take in a trial's end, which Ray's own record of it tells."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Take in that a trial failed, and is tried again or not."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Take in that a trial that was paused is stopped."""

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Stop the trials that their rounds leave behind, and choose one that goes on, or a new one."""
        for number, trial in self._trials.items():
            if trial.is_finished():
                self._values.setdefault(number, math.inf)
        going_on = []
        for number, trial in sorted(self._trials.items()):
            kept = self._kept(number // self._rounds.trials)
            is_unwanted = trial.trial_id in self.ended_by_hand
            if trial.status != Trial.PAUSED or (kept is None and not is_unwanted):
                continue
            if kept is not None and number in kept and not is_unwanted:
                going_on.append(trial)
            else:
                tune_controller.stop_trial(trial)
        new = (trial for trial in tune_controller.get_trials() if trial.status == Trial.PENDING)
        return next(iter([*going_on, *new]), None)

    def debug_string(self) -> str:
        """Describe what is compared."""
        return f"rounds of {self._rounds.trials} trials, compared after {self._rounds.steps} steps"

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing: the ledger is the state."""

    def _is_compared(self, point: Any) -> bool:
        return bool(point["step"] >= self._rounds.steps or point["schedule_percent"] >= 100)

    def _numbers(self, of_round: int) -> range:
        size = self._rounds.trials
        return range(of_round * size, min((of_round + 1) * size, self._num_trials))

    def _kept(self, of_round: int) -> set[int] | None:
        """Return the numbers of the trials that go on; None while the round has trials to come."""
        numbers = self._numbers(of_round)
        if any(number not in self._values for number in numbers):
            return None
        good = [number for number in numbers if math.isfinite(self._values[number])]
        return set(sorted(good, key=lambda number: self._values[number])[: self._rounds.kept])

    def _is_over(self, of_round: int) -> bool:
        return all(
            number in self._ended or (number in self._trials and self._trials[number].is_finished())
            for number in self._numbers(of_round)
        )


def _number(trial_id: str) -> int:
    """Return a trial's place in the order in which a sweep draws."""
    return int(trial_id.rpartition("_")[2])
