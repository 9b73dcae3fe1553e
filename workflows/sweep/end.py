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

    An observer of the sweep, which hands on what it is told. num_trials: how many there are to be. unfit: the
    nodes that trials leave out, by now. spare: the process, once it is there.
    """

    observer: SweepObserver
    shares: dict[str, float]
    num_trials: Callable[[], int]
    unfit: Callable[[], set[str]] = set
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
            nodes = self._fit_nodes(self.unfit())
            self.spare = Spare(self.shares, nodes[0]) if nodes else None

    def worker(self) -> Worker:
        """Return the worker for the end, which the spare is handed over to; no unfit node gets it."""
        spare, self.spare, unfit = self.spare, None, self.unfit()
        nodes = self._fit_nodes(unfit) if unfit else []
        if spare is not None and spare.place[0] in unfit:
            spare = None
        return Worker(self.shares, spare, nodes[0] if nodes else None)

    def _fit_nodes(self, unfit: set[str]) -> list[str]:
        """Return the nodes that the end may be on, this process's first."""
        here = ray.get_runtime_context().get_node_id()
        there = (node["NodeID"] for node in nodes_for(self.shares))
        return sorted((node for node in there if node not in unfit), key=lambda node: node != here)


def _load() -> None:
    with suppress(ImportError):  # whoever needs it is told
        importlib.import_module("reporting.sweep_page")
        load_libraries()
