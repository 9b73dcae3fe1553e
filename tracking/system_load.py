"""Owns the load of this machine on a sweep's run: memory, processors, GPUs, every ten seconds.

It is measured by MLflow's monitors and delivered with all other news: while the server is away, MLflow's own
thread would print, make the end of a command wait, and stop for good.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlflow.entities import Metric
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from qlora.failpoints import durable
from tracking.address import tracking_uri
from tracking.store import asking, connect

_INTERVAL_SECONDS = 10
_SAMPLES_A_REQUEST = 25  # MLflow takes 1000 metrics a request; a machine with many GPUs has dozens a sample
_NUM_KEPT = 8640  # a day's, while the server is away


class SystemLoad:
    """Samples of this machine's load for one run."""

    def __init__(self, run_id: str, began_ms: int):
        """Begin without samples. Steps count intervals since the run began, so that they never go back."""
        self._run_id, self._began_ms = run_id, began_ms
        logging.getLogger(SystemMetricsMonitor.__module__).setLevel(logging.ERROR)  # tells of missing GPUs
        self._monitor = SystemMetricsMonitor(run_id, tracking_uri=tracking_uri())
        self._samples: deque[list[Metric]] = deque(maxlen=_NUM_KEPT)
        self._leaving: list[list[Metric]] = []

    @contextmanager
    def sampled(self, has_news: Callable[[], None]) -> Iterator[None]:
        """Sample, within, at once and then every ten seconds; `has_news` is called after each sample."""
        is_over = threading.Event()

        def work() -> None:
            while not is_over.wait(_INTERVAL_SECONDS):
                self._sample()
                has_news()

        thread = threading.Thread(target=work, name="system-load", daemon=True)
        self._sample()
        has_news()
        thread.start()
        try:
            yield
        finally:
            is_over.set()

    @asking()
    def log(self, answered: Callable[[], None] = lambda: None) -> None:
        """Log the samples that are not logged yet; what comes in meanwhile is left for the next time.

        A server may be slower than samples come. `answered` is called whenever it has answered.
        """
        client, num_left = connect(), len(self._leaving) + len(self._samples)
        while num_left > 0:
            while self._samples and len(self._leaving) < _SAMPLES_A_REQUEST:
                self._leaving.append(self._samples.popleft())
            with durable("load logged"):
                client.log_batch(self._run_id, metrics=[metric for one in self._leaving for metric in one])
            answered()
            num_left -= len(self._leaving)
            self._leaving = []

    def _sample(self) -> None:
        now_ms = time.time_ns() // 1_000_000
        step = round((now_ms - self._began_ms) / 1000 / _INTERVAL_SECONDS)
        self._monitor.collect_metrics()
        values = self._monitor.aggregate_metrics()
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        self._samples.append([Metric(f"system/{key}", value, now_ms, step) for key, value in values.items()])
