"""Owns early stopping in rounds: trials are compared once, at the same step, and the best of a round go on.

Successive halving with a single halving, behind Ray's interface. A trial that waits for its round is paused:
its seat on the GPU is given back, and it goes on from its checkpoint exactly where it stood. What is decided
of a round depends on its trials' scores alone, so that a sweep that goes on decides the same.
Source: https://proceedings.mlr.press/v51/jamieson16.html
"""

import bisect
import math
from collections.abc import Sequence
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from tuning.clone_seats import CloneSeats
from tuning.ledger import TrialRecord
from tuning.objective import score_of
from tuning.strategy import Rounds


class RoundScheduler(TrialScheduler):
    """Pauses each trial at the rounds' step, and lets the best of a round train on.

    `records`: of the trials that began before. `num_devices`: that many rounds are under way at once.
    `draws`: how many trials were added at a time, which make rounds of their own; it may grow. Clones belong
    to no round: they train whole.
    waiting: ids of the trials that are paused until their round is decided. ended_by_hand: of those that
    people want stopped. clones: see to their seats, if people may ask for some.
    """

    def __init__(
        self,
        rounds: Rounds,
        records: Sequence[TrialRecord],
        num_trials: int,
        num_devices: int,
        draws: Sequence[int] = (),
    ):
        super().__init__()
        self._rounds, self._num_trials, self._num_devices = rounds, num_trials, num_devices
        self._draws, self._known_rounds = draws, list[range]()
        self._clones = sorted(_number(one.trial_id) for one in records if one.cloned_from is not None)
        self._trials = dict[int, Any]()
        self._values = dict[int, float]()  # by a trial's place among those in rounds: its score, compared
        self._ended = set[int]()
        self.waiting, self.ended_by_hand = set[str](), set[str]()
        self.clones: CloneSeats | None = None
        for record in records:
            if (place := self._place(record.trial_id)) is None:
                continue
            point = next((point for point in record.curve if self._is_compared(point)), None)
            if point is not None:
                self._values[place] = score_of(point)
            if record.has_ended:
                self._values.setdefault(place, math.inf)
                self._ended.add(place)

    def may_begin(self, number: int) -> bool:
        """Tell whether a trial may begin now: rounds are filled, and a new one needs a device without one."""
        place, rounds = number - bisect.bisect(self._clones, number), self._rounds_until_now()
        if place >= rounds[-1].stop:
            return False
        of_round = self._round_of(place)
        under_way = sum(not self._is_over(places) for places in rounds if places.start < of_round.start)
        return place > of_round.start or under_way < self._num_devices

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take in a trial; one that has been compared before waits for what is decided of its round.

        One that failed and is tried again is added again, as pending: if it goes on, it stays that.
        """
        number = _number(trial.trial_id)
        if self.clones is not None and self.clones.is_clone(trial) and number not in self._clones:
            bisect.insort(self._clones, number)
        if (place := self._place(trial.trial_id)) is None:
            return
        is_again = place in self._trials
        self._trials[place] = trial
        if place not in self._values:
            return
        if is_again:
            if place not in (self._kept(self._round_of(place)) or ()):
                tune_controller._set_trial_status(trial, Trial.PAUSED)
        else:
            trial.init_local_path()  # which Ray asks for even if it stops the trial before it runs here
            trial.set_status(Trial.PAUSED)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Pause a trial where it is compared."""
        if self.clones is not None and self.clones.takes_seat(tune_controller, trial, result):
            return str(TrialScheduler.NOOP)
        self.waiting.discard(trial.trial_id)
        if (place := self._place(trial.trial_id)) is None:
            return str(TrialScheduler.CONTINUE)
        if not math.isfinite(score_of(result)):
            self._values.setdefault(place, math.inf)
        elif place not in self._values and self._is_compared(result):
            self._values[place] = score_of(result)
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
        clones, trials = self.clones, tune_controller.get_trials()
        first = None if clones is None else clones.next(tune_controller)
        for place, trial in self._trials.items():
            if trial.is_finished():
                self._values.setdefault(place, math.inf)
        going_on = []
        for place, trial in sorted(self._trials.items()):
            kept = self._kept(self._round_of(place))
            is_aside = clones is not None and clones.is_paused(trial)
            may_come_back = is_aside and clones is not None and not clones.is_full(trials)
            is_unwanted = trial.trial_id in self.ended_by_hand
            if trial.status != Trial.PAUSED or (kept is None and not is_aside and not is_unwanted):
                continue
            if is_unwanted or (not is_aside and kept is not None and place not in kept):
                tune_controller.stop_trial(trial)
            elif may_come_back or not is_aside:
                going_on.append(trial)
        new = (trial for trial in trials if trial.status == Trial.PENDING)
        return first or next(iter([*going_on, *new]), None)

    def debug_string(self) -> str:
        """Describe what is compared."""
        return f"rounds of {self._rounds.trials} trials, compared after {self._rounds.steps} steps"

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing: the ledger is the state."""

    def _is_compared(self, point: Any) -> bool:
        return bool(point["step"] >= self._rounds.steps or point["schedule_percent"] >= 100)

    def _place(self, trial_id: str) -> int | None:
        """Return a trial's place among those in rounds; None for a clone."""
        number = _number(trial_id)
        return None if number in self._clones else number - bisect.bisect(self._clones, number)

    def _rounds_until_now(self) -> list[range]:
        """Return the places of each round's trials; what is added makes rounds behind the others."""
        first, found = 0, self._known_rounds
        for count in (self._num_trials, *self._draws):
            end = first + count
            if not found or first >= found[-1].stop:
                begins = range(first, end, self._rounds.trials)
                found += [range(begin, min(begin + self._rounds.trials, end)) for begin in begins]
            first = end
        return found

    def _round_of(self, place: int) -> range:
        rounds = self._rounds_until_now()
        return rounds[bisect.bisect(rounds, place, key=lambda places: places.start) - 1]

    def _kept(self, places: range) -> set[int] | None:
        """Return the places of the trials that go on; None while the round has trials to come."""
        if any(place not in self._values for place in places):
            return None
        good = [place for place in places if math.isfinite(self._values[place])]
        return set(sorted(good, key=lambda place: self._values[place])[: self._rounds.kept])

    def _is_over(self, places: range) -> bool:
        return all(
            place in self._ended or (place in self._trials and self._trials[place].is_finished())
            for place in places
        )


def _number(trial_id: str) -> int:
    """Return a trial's place in the order in which a sweep draws."""
    return int(trial_id.rpartition("_")[2])
