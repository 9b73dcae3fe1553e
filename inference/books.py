"""Owns the books of a batch job: how far its present run is, and what all of its runs have cost.

Refuses to know rows' contents.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora.cost import Cost, Costs, HeldGpus


@dataclass(frozen=True)
class Progress:
    """The progress of a job's present run.

    num_done, num_tokens: rows and tokens that this run generated so far. num_rows: rows that it has to
    generate. seconds: time since an engine was ready. expected: what its GPUs will have cost, if it has any.
    """

    num_done: int
    num_tokens: int
    num_rows: int
    seconds: float
    expected: Cost | None = None

    @property
    def seconds_left(self) -> float:
        """Return the seconds that the other rows take, if they go on like those that are done."""
        return self.seconds / max(self.num_done, 1) * (self.num_rows - self.num_done)

    def __str__(self) -> str:
        rows_per_second = self.num_done / self.seconds
        tokens_per_second = self.num_tokens / self.seconds
        cost = f", {self.expected.words} in all" if self.expected is not None else ""
        return (
            f"{self.num_done}/{self.num_rows} rows, {rows_per_second:.2f} rows/s, "
            f"{tokens_per_second:.0f} tokens/s, {self.seconds_left:.0f} s left{cost}"
        )


class Books:
    """Keeps a run's account from its beginning on, and in a file what GPUs all runs of the job held.

    `num_rows`: that this run has to generate. `resume`: earlier runs' GPUs count. `price_per_gpu_hour`: see
    qlora.cost.
    """

    def __init__(self, path: Path, num_rows: int, price_per_gpu_hour: float | None, *, resume: bool):
        if not resume:
            path.unlink(missing_ok=True)
        self._path, self._num_rows, self._price = path, num_rows, price_per_gpu_hour
        self._began, self._ready = time.monotonic(), float("inf")
        self._first_row_seconds: float | None = None
        self._num_tokens = self._num_workers = 0
        self._held = HeldGpus(path, self._began, 0)

    @contextmanager
    def engines_held(self, num_workers: int, num_gpus: Callable[[], int]) -> Iterator[None]:
        """Count the GPUs that engines hold, within; `num_gpus` tells how many they are at a time."""
        self._num_workers, self._num_gpus = num_workers, num_gpus
        self._held = HeldGpus(self._path, time.monotonic(), num_gpus())
        try:
            yield
        finally:
            self._held.count()
            self._held.keep()

    def add(self, num_done: int, num_tokens: int, seconds: float) -> Progress:
        """Count new tokens of rows that are done, `seconds` since their engine began on them.

        `num_done`: rows that this run has done, with them.
        """
        now = time.monotonic()
        if self._first_row_seconds is None:
            self._first_row_seconds = round(now - self._began, 3)
        self._ready = min(self._ready, now - seconds)
        self._num_tokens += num_tokens
        reached = Progress(num_done, self._num_tokens, self._num_rows, max(1e-9, self._generating))
        if not (num_gpus := self._num_gpus()):
            return reached
        self._held.count(num_gpus)
        gpu_seconds = self._held.gpu_seconds + num_gpus * reached.seconds_left
        self._held.plan(gpu_seconds)
        return replace(reached, expected=Cost(gpu_seconds, self._price))

    def close(self) -> "Account":
        """Return the account of the run, which is over."""
        return Account(
            num_rows=self._num_rows,
            num_tokens=self._num_tokens,
            num_workers=self._num_workers,
            seconds=time.monotonic() - self._began,
            seconds_generating=self._generating,
            first_row_seconds=self._first_row_seconds,
            price_per_gpu_hour=self._price,
            costs=self._held.costs(self._price),
        )

    @property
    def _generating(self) -> float:
        """Return the seconds since the first engine began to generate; 0 if none did."""
        return max(0.0, time.monotonic() - self._ready)


@dataclass(frozen=True)
class Account:
    """The account of a run that is over.

    num_rows, num_tokens: that it generated. num_workers: engines. seconds_generating: since the first engine
    began. first_row_seconds: from its beginning to its first rows; None without any. costs: of all runs of
    the job, if they had GPUs.
    """

    num_rows: int
    num_tokens: int
    num_workers: int
    seconds: float
    seconds_generating: float
    first_row_seconds: float | None
    price_per_gpu_hour: float | None
    costs: Costs | None

    @property
    def figures(self) -> dict[str, Any]:
        """Return what the job's meta file says of it."""
        cost = self.costs and {**self.costs.figures, "price_per_gpu_hour": self.price_per_gpu_hour}
        return {
            "rows_generated": self.num_rows,
            "workers": self.num_workers,
            "seconds": round(self.seconds, 3),
            "rows_per_second": round(self.num_rows / max(self.seconds, 1e-9), 3),
            "tokens": self.num_tokens,
            "seconds_generating": round(self.seconds_generating, 3),
            "rows_per_second_generating": round(self.num_rows / max(self.seconds_generating, 1e-9), 3),
            "seconds_to_first_row": self.first_row_seconds,
            "cost": cost,
        }
