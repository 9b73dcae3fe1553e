"""Owns what is made ready for a sweep's end while its trials run: libraries here, and the proof's process.

Refuses to know what the end does.
"""

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tuning.ledger import TrialRecord
from tuning.sweep_callback import SweepObserver
from workflows.worker import Spare, Worker

# What a page and a registration load, all of it on first use.
_LIBRARIES = ("mlflow.pyfunc", "mlflow.models", "reporting.sweep_page", "matplotlib.backends.backend_svg")


@dataclass
class SweepEnd:
    """Has the end's libraries loaded at once, and its process once all trials have begun.

    An observer of the sweep, which hands on what it is told. num_trials: how many there are to be. spare: the
    process, once it is there.
    """

    observer: SweepObserver
    shares: dict[str, float]
    num_trials: Callable[[], int]
    spare: Spare | None = None
    _begun: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        threading.Thread(target=_load, name="libraries of the end", daemon=True).start()

    def trial_changed(self, record: TrialRecord) -> None:
        """See SweepObserver."""
        self.observer.trial_changed(record)
        if record.status != "pending":
            self._begun.add(record.trial_id)
        if self.spare is None and len(self._begun) >= self.num_trials():
            self.spare = Spare(self.shares)

    def worker(self) -> Worker:
        """Return the worker for the end, once there is a place for it."""
        return Worker(self.shares, self.spare)


def _load() -> None:
    for name in _LIBRARIES:
        importlib.import_module(name)
