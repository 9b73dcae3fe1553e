"""Owns early stopping that survives a restore: Ray's ASHA, whose own state Ray does not save.

Source: https://arxiv.org/abs/1810.05934
"""

from pathlib import Path
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from tuning.ledger import Ledger


class RestoredASHA(TrialScheduler):
    """Ray's ASHA behind Ray's interface.

    A trial that comes back is told again at the rungs that it had reached.
    """

    def __init__(self, ledger_folder: Path, **options: Any):
        super().__init__()
        self._ledger_folder = ledger_folder
        self._asha = ASHAScheduler(**options)

    @property
    def metric(self) -> str | None:
        """Return what trials are compared by."""
        return self._asha.metric  # type: ignore[no-any-return]

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Take over what trials are compared by, and which way."""
        return self._asha.set_search_properties(metric, mode, **spec)  # type: ignore[no-any-return]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take in a trial, and replay its recorded curve."""
        self._asha.on_trial_add(tune_controller, trial)
        record = Ledger(self._ledger_folder).records.get(trial.trial_id)
        for point in record.curve if record else ():
            self._asha.on_trial_result(tune_controller, trial, point)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether a trial goes on."""
        return self._asha.on_trial_result(tune_controller, trial, result)  # type: ignore[no-any-return]

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Take in a trial's last result."""
        self._asha.on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Take in that a trial failed."""
        self._asha.on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget a trial that was not running."""
        self._asha.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Choose the next trial."""
        return self._asha.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        """Describe the rungs."""
        return self._asha.debug_string()  # type: ignore[no-any-return]

    def save(self, checkpoint_path: str) -> None:
        """Write Ray's part of the state."""
        self._asha.save(checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        """Read Ray's part of the state."""
        self._asha.restore(checkpoint_path)
