"""Owns the way of Ray Tune's events: into the ledger, to whoever observes, onto the screen."""

import errno
import os
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.experiment import Trial

from qlora.files import disk_without_space, is_full
from tuning.checkpoints import keep_two
from tuning.ledger import OF_OBJECTIVE, POINT, Ledger, Status, TrialRecord
from tuning.orders import BY_HAND, SET_ASIDE, Order, Orders
from tuning.screen import SweepScreen
from tuning.space import Space
from tuning.spending import SpendingClock


class SweepObserver(Protocol):
    """Anything that is told what trials do, such as the tracking server."""

    def trial_changed(self, record: TrialRecord) -> None:
        """Take in that a trial started, reported a point (the last of its curve) or ended."""


@dataclass(frozen=True)
class Hand:
    """Holds what people may do to a sweep while it runs.

    orders: what they ask for. clones: by trial, the name of an order, and the order. end_trial: has a trial
    end at its next step.
    """

    orders: Orders
    clones: Mapping[str, tuple[str, Order]]
    end_trial: Callable[[str], None]


class SweepCallback(tune.Callback):
    """Ray Tune's events -> ledger, observer and screen.

    Ray stores callbacks with a sweep; this one stores nothing, since nothing that Ray stores is read again.
    `scheduler` knows which trials it told to stop or wait; `clock` counts what they spend. `hand`: what
    people ask for. `go_on` is called at each turn of Ray's loop, and raises to end it.
    """

    def __init__(
        self,
        ledger: Ledger,
        space: Space,
        screen: SweepScreen,
        observer: SweepObserver,
        scheduler: Any,
        clock: SpendingClock,
        hand: "Hand",
        go_on: Callable[[], None],
    ):
        self._ledger, self._space, self._screen, self._observer = ledger, space, screen, observer
        self._stopped_early: Set[str] = getattr(scheduler, "stopped", set())
        self._waiting: Set[str] = getattr(scheduler, "waiting", set())
        self._clock, self._hand, self._go_on = clock, hand, go_on
        self._to_be_stopped: set[str] = getattr(scheduler, "ended_by_hand", set())
        self._full_disk: OSError | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Ask whether to go on, count the time, and carry out what people have asked for since."""
        self._go_on()
        self._clock.count([trial.trial_id for trial in trials if trial.status == Trial.RUNNING])
        orders = self._hand.orders
        if orders.look():
            self._screen.expect(self._space.num_trials + orders.added)
            self._to_be_stopped |= orders.stops
            for trial_id in orders.stops:
                record = self._ledger.records.get(trial_id)
                if record is not None and not record.has_ended:
                    self._hand.end_trial(trial_id)  # again and again: it may be on its way to another host

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial runs, again after a restore."""
        record = self._ledger.records.get(trial.trial_id) or self._new_record(trial)
        began = record.started_at or time.time()
        self._put(replace(record, status="running", started_at=began, ended_at=None, error=None))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record a point of a trial's curve, and in the same write whether it was the last one."""
        self._screen.note(result.get("host_notes", ()))
        record = self._ledger.records[trial.trial_id]
        if "diverged" in result:
            self._end(replace(record, error=result["diverged"]), "diverged")
        elif "unjudged" in result:
            self._end(replace(record, error=result["unjudged"]), "failed")
        elif SET_ASIDE in result:
            self._put(replace(record, status="pending"))
        elif "perplexities" in result:
            point = {key: float(result[key]) for key in (*POINT, *OF_OBJECTIVE) if key in result}
            record = record.with_point(point, result["perplexities"])
            if record.percent >= 100 or trial.trial_id in self._stopped_early:
                self._end(record, _status_of(record))
            else:
                waits = trial.trial_id in self._waiting
                self._put(replace(record, status="pending") if waits else record)

    def on_checkpoint(
        self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any
    ) -> None:
        """Keep two checkpoints of a trial: the newest, and the best of those before."""
        keep_two(trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record how a trial ended."""
        record = self._ledger.records[trial.trial_id]
        if not record.has_ended:
            is_by_hand = trial.trial_id in self._hand.orders.stops and record.percent < 100
            self._end(replace(record, error=BY_HAND if is_by_hand else record.error), _status_of(record))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record why a trial failed, unless that ends the sweep."""
        if self._is_disk_full(trial):
            return
        record = self._ledger.records.get(trial.trial_id) or self._new_record(trial)
        self._end(replace(record, error=_last_line(trial.get_error())), "failed")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Don't let a trial be tried again and again on a disk without space."""
        self._is_disk_full(trial)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Keep the screen up to date, and end the sweep on a disk without space."""
        self._screen.update(self._records())
        if self._full_disk is not None:
            raise self._full_disk

    def _is_disk_full(self, trial: Any) -> bool:
        """Tell whether a trial met a disk without space; the sweep then ends, for all to go on later.

        Ray keeps errors below its temporary folder, so that none is known if that is full.
        """
        error, kept = trial.get_error(), Path(trial.local_path)
        place = str(kept) if error is None and is_full(kept) else disk_without_space(error)
        if place is not None:
            self._full_disk = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
        return place is not None

    def _records(self) -> Sequence[TrialRecord]:
        return list(self._ledger.records.values())

    def _new_record(self, trial: Any) -> TrialRecord:
        record = TrialRecord(trial.trial_id, self._space.trial_config(trial.config))
        name, order = self._hand.clones.get(trial.trial_id, (None, None))
        return record if order is None else replace(record, cloned_from=order.trial_id, order=name)

    def _end(self, record: TrialRecord, status: Status) -> None:
        self._put(replace(record, status=status, ended_at=time.time()))

    def _put(self, record: TrialRecord) -> None:
        self._ledger.put(record)
        self._observer.trial_changed(record)


def _status_of(record: TrialRecord) -> Status:
    return "finished" if record.percent >= 100 else "stopped"


def _last_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines() if error else []
    return lines[-1] if lines else "unknown error; see Ray's log"
