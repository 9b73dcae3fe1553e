"""Owns Ray's schedulers as a sweep needs them: told again what trials had reached, clones first.

Source: https://arxiv.org/abs/1810.05934
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from tuning.clone_seats import CloneSeats
from tuning.ledger import TrialRecord
from tuning.objective import METRIC, score_of


class RestoredScheduler(TrialScheduler):
    """A scheduler of Ray's behind Ray's interface, ASHA or FIFO.

    `records`: of the trials that began before; their curves are told again, at the rungs that they had
    reached. stopped: ids of the trials that it told to stop. ended_by_hand: of those that people want
    stopped. clones: see to their seats, if people may ask for some.
    """

    def __init__(self, scheduler: TrialScheduler, records: Sequence[TrialRecord]):
        super().__init__()
        self._to_replay = list(records)
        self._inner = scheduler
        self.stopped, self.ended_by_hand = set[str](), set[str]()
        self.clones: CloneSeats | None = None

    @property
    def metric(self) -> str | None:
        """Return what trials are compared by."""
        return self._inner.metric  # type: ignore[no-any-return]

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Take over what trials are compared by, and which way."""
        return self._inner.set_search_properties(metric, mode, **spec)  # type: ignore[no-any-return]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take in a trial; before the first one, replay the recorded curves."""
        while self._to_replay:
            record = self._to_replay.pop(0)
            stand_in: Any = SimpleNamespace(trial_id=record.trial_id)
            self._inner.on_trial_add(tune_controller, stand_in)
            for point in record.curve:
                told = {METRIC: score_of(point), **point}
                self._inner.on_trial_result(tune_controller, stand_in, told)
        self._inner.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether a trial goes on."""
        if self.clones is not None and self.clones.takes_seat(tune_controller, trial, result):
            return str(TrialScheduler.NOOP)
        decision = self._inner.on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self.stopped.add(trial.trial_id)
        return decision  # type: ignore[no-any-return]

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Take in a trial's last result."""
        self._inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Take in that a trial failed."""
        self._inner.on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget a trial that was not running."""
        self._inner.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Choose the next trial: one that people asked for, one that made room for it, whichever is next."""
        if self.clones is not None:
            if (clone := self.clones.next(tune_controller)) is not None:
                return clone
            trials = tune_controller.get_trials()
            paused = self.clones.paused(trials)
            for trial in paused:
                if trial.trial_id in self.ended_by_hand:
                    tune_controller.stop_trial(trial)
                elif not self.clones.is_full(trials):
                    return trial
            if paused:  # which the scheduler behind would choose
                return next((trial for trial in trials if trial.status == Trial.PENDING), None)
        return self._inner.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        """Describe the rungs."""
        return self._inner.debug_string()  # type: ignore[no-any-return]

    def save(self, checkpoint_path: str) -> None:
        """Write Ray's part of the state."""
        self._inner.save(checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        """Read Ray's part of the state."""
        self._inner.restore(checkpoint_path)
