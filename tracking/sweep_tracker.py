"""Owns the way of a sweep's events into MLflow: trials' events in a thread of its own, the rest at once.

Refuses to know Ray. Training never waits for the tracking server: see tracking.delivery.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, RunTag

from qlora.failpoints import durable
from tracking.delivery import Delivery
from tracking.endings import within
from tracking.store import asking, children, connect
from tracking.system_load import SystemLoad
from tracking.trial_runs import TrialRecord, TrialRuns

_PATIENCE_SECONDS = 30.0
_LOAD = "system load"


class SweepTracker:
    """Follows a sweep's trials into MLflow.

    A child's metrics are drawn over optimizer steps; those whose name begins with `epoch_` over whole epochs,
    the training loss being the mean of the epoch's.
    """

    def __init__(self, experiment_id: str, sweep: str, parent_run_id: str, began_ms: int):
        """Follow a sweep whose parent run began at a time, in ms since 1970."""
        self.experiment_id, self.sweep, self.parent_run_id = experiment_id, sweep, parent_run_id
        self._began_ms = began_ms
        self._delivery = Delivery()
        self._runs = TrialRuns(experiment_id, sweep, parent_run_id, self._delivery.moved)
        self._came_in: dict[str, dict[float, int]] = {}  # when, by trial and step

    def trial_changed(self, record: TrialRecord) -> None:
        """Have a trial's run brought up to its record: created, its new points logged, ended.

        Returns at once, and never raises.
        """
        now_ms = time.time_ns() // 1_000_000
        times = self._came_in.setdefault(record.trial_id, {})
        for point in record.curve:
            times.setdefault(point["step"], now_ms)
        self._delivery.put(record.trial_id, partial(self._runs.bring_up, record, times, now_ms))

    def catch_up(self, timeout_seconds: float) -> None:
        """Wait until all that trials reported is logged. Raises TrackingAwayError if that takes longer."""
        self._delivery.catch_up(timeout_seconds)

    def run_id(self, record: TrialRecord) -> str:
        """Return the child run of a trial, created with its parameters if there is none yet.

        Raises TrackingAwayError.
        """
        if self._runs.run_id(record.trial_id) is None:
            self.trial_changed(record)
            self.catch_up(_PATIENCE_SECONDS)
        return self._known_run(record.trial_id)

    @asking()
    def note(
        self,
        facts: Mapping[str, Any],
        files: Sequence[Path] = (),
        trial_tags: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Log tags and files of the sweep, and tags of trials by their ids."""
        client = connect()
        tags = [RunTag(key, str(value)[:5000]) for key, value in facts.items() if value is not None]
        with durable("sweep noted"):
            client.log_batch(self.parent_run_id, tags=tags)
        for file in files:
            with durable("artifacts logged"):
                client.log_artifact(self.parent_run_id, str(file))
        for trial_id, more in (trial_tags or {}).items():
            with durable("trial noted"):
                told = [RunTag(key, value) for key, value in more.items()]
                client.log_batch(self._known_run(trial_id), tags=told)

    @contextmanager
    def system_metrics(self) -> Iterator[None]:
        """Draw, within, this machine's load, memory and GPUs on the parent run, every ten seconds."""
        load = SystemLoad(self.parent_run_id, self._began_ms)
        log = partial(load.log, self._delivery.moved)
        with load.sampled(lambda: self._delivery.put(_LOAD, log)):
            yield

    def end(self, status: str, metrics: Mapping[str, float], timeout_seconds: float | None = None) -> bool:
        """End the parent run with FINISHED, FAILED or KILLED, and what was left running with KILLED.

        Nothing is delivered afterwards. With a time limit, returns whether the server took it within that;
        without one, raises TrackingAwayError if it is away.
        """
        try:
            if timeout_seconds is None:
                self._end(status, metrics, _PATIENCE_SECONDS)
                return True
            return within(timeout_seconds, lambda: self._end(status, metrics, timeout_seconds / 2))
        finally:
            self._delivery.stop()

    @asking()
    def _end(self, status: str, metrics: Mapping[str, float], patience_seconds: float) -> None:
        self._delivery.drain(patience_seconds)
        self._delivery.stop()
        client, now_ms = connect(), time.time_ns() // 1_000_000
        with durable("sweep noted"):
            values = [Metric(key, value, now_ms, 0) for key, value in metrics.items()]
            client.log_batch(self.parent_run_id, metrics=values)
        left_running = " and attributes.status = 'RUNNING'"
        for child in children(client, self.experiment_id, self.parent_run_id, left_running):
            with durable("run ended"):
                client.set_terminated(child.info.run_id, "KILLED")
        with durable("run ended"):
            client.set_terminated(self.parent_run_id, status)

    def _known_run(self, trial_id: str) -> str:
        run_id = self._runs.run_id(trial_id)
        assert run_id is not None, "trials are noted after they were caught up with"
        return run_id
