"""Owns what is made ready for a sweep's end while its trials run: libraries here, and the proof's process.

Refuses to know what the end does.
"""

import importlib
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import ray

from tracking.logged_model import load_libraries
from tuning.ledger import TrialRecord
from tuning.placement import nodes_for
from tuning.sweep_callback import SweepObserver
from workflows.worker import Spare, Worker


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
            here = ray.get_runtime_context().get_node_id()
            nodes = sorted((node["NodeID"] for node in nodes_for(self.shares)), key=lambda node: node != here)
            self.spare = Spare(self.shares, nodes[0]) if nodes else None

    def worker(self) -> Worker:
        """Return the worker for the end, which the spare is handed over to."""
        spare, self.spare = self.spare, None
        return Worker(self.shares, spare)


def _load() -> None:
    with suppress(ImportError):  # whoever needs it is told
        importlib.import_module("reporting.sweep_page")
        load_libraries()
