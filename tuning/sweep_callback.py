"""Owns the way of Ray Tune's events: into the ledger, to whoever observes, onto the screen."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ray import tune

from qlora.config import InputError
from tuning.ledger import Ledger, TrialRecord
from tuning.restored_checkpoints import mend_checkpoints
from tuning.screen import SweepScreen
from tuning.space import Space

_POINT = (
    "step",
    "epoch",
    "schedule_percent",
    "public_perplexity",
    "training_loss",
    "learning_rate",
    "tokens_per_second",
    "peak_memory_gib",
)


class SweepObserver(Protocol):
    """Anything that is told what trials do, such as the tracking server."""

    def trial_changed(self, record: TrialRecord) -> None:
        """Take in that a trial started, reported a point (the last of its curve) or ended."""


class SweepCallback(tune.Callback):
    """Ray Tune's events -> ledger, observer and screen.

    Ray stores callbacks with a sweep; this one stores nothing, since whoever restores a sweep brings one of
    its own.
    """

    def __init__(self, folder: Path, space: Space, zero_shot: float, observer: SweepObserver):
        self._folder, self._space, self._observer = folder, space, observer
        self._screen = SweepScreen(space.num_trials, zero_shot)
        self._ledger = Ledger(folder / "trials")
        self._has_begun = False

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Notice a state of Ray's that lost trials, or their checkpoints. Raises InputError."""
        if trials and set(self._ledger.records) - {trial.trial_id for trial in trials}:
            raise InputError(
                self._folder / "ray",
                "its state is damaged and lost trials that had run; start a new sweep under another --name",
            )
        if not self._has_begun:
            self._has_begun = True
            for trial in trials:
                mend_checkpoints(trial, self._ledger.records.get(trial.trial_id))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial runs, again after a restore."""
        record = self._ledger.records.get(trial.trial_id)
        if record is None:
            record = replace(self._new_record(trial), started_at=time.time())
        self._put(replace(record, status="running", ended_at=None))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record a point of a trial's curve."""
        self._screen.note(result.get("host_notes", ()))
        if "public_perplexity" in result:
            point = {key: float(result[key]) for key in _POINT}
            self._put(self._ledger.records[trial.trial_id].with_point(point, result["perplexities"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record how a trial ended."""
        record = self._ledger.records[trial.trial_id]
        status = "finished" if record.percent >= 100 else "stopped"
        self._put(replace(record, status=status, ended_at=time.time()))  # type: ignore[arg-type]

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record why a trial failed."""
        record = self._ledger.records.get(trial.trial_id) or self._new_record(trial)
        self._put(replace(record, status="failed", error=_last_line(trial.get_error()), ended_at=time.time()))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Keep the screen up to date."""
        self._screen.update(self._records())

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Leave the last table on the screen."""
        self._screen.close(self._records())

    def give_screen_back(self) -> None:
        """Leave the terminal as it was, however the sweep ended."""
        self._screen.stop()

    def _records(self) -> Sequence[TrialRecord]:
        return list(self._ledger.records.values())

    def _new_record(self, trial: Any) -> TrialRecord:
        return TrialRecord(trial.trial_id, self._space.trial_settings(trial.config).model_dump(mode="json"))

    def _put(self, record: TrialRecord) -> None:
        self._ledger.put(record)
        self._observer.trial_changed(record)


def _last_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines() if error else []
    return lines[-1] if lines else "unknown error; see Ray's log"
