"""Owns what a sweep spends, minutes and GPU-seconds, and the end of its budget.

Time counts while trials run, over all sittings of a sweep: what was spent is kept in its folder. A GPU counts
as a whole however many trials share it, since a sweep has it to itself.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from ray.tune import Stopper

from qlora.config import InputError
from qlora.files import read_json, write_json
from tuning.strategy import Budget

_FILE = "spent.json"
_SECONDS_BETWEEN_WRITES = 5.0
_LONGEST_TURN = 60.0  # a machine that slept or stood still was not at work


@dataclass(frozen=True)
class Spent:
    """Tells what trials of a sweep have spent so far. is_over: whether that was the budget."""

    seconds: float = 0.0
    device_seconds: float = 0.0
    is_over: bool = False


_SPENT = TypeAdapter(Spent)


def spent_so_far(folder: Path) -> Spent:
    """Return what the trials of a sweep have spent; nothing for one that has not begun."""
    try:
        return _SPENT.validate_python(read_json(folder / _FILE, ""))
    except (FileNotFoundError, InputError, ValidationError):
        return Spent()


class SpendingClock(Stopper):
    """Counts what a sweep's trials spend, and stops them all when that is the budget.

    `num_devices_of`: how many devices trials are on, by their ids; 0 if that is not known: then at most
    `num_devices`.
    """

    def __init__(
        self,
        budget: Budget | None,
        folder: Path,
        num_devices: int,
        num_devices_of: Callable[[Sequence[str]], int] = lambda trial_ids: 0,
    ):
        self._budget, self._folder, self._num_devices = budget, folder, num_devices
        self._num_devices_of = num_devices_of
        self.spent = spent_so_far(folder)
        self._counted_at: float | None = None
        self._written_at = 0.0

    def count(self, running: Sequence[str]) -> None:
        """Count the time since the last call, for the devices that trials run on now, given their ids."""
        now = time.monotonic()
        passed = min(now - (now if self._counted_at is None else self._counted_at), _LONGEST_TURN)
        self._counted_at = now
        if not running:
            return
        num_devices = self._num_devices_of(running) or min(len(running), self._num_devices)
        spent = replace(
            self.spent,
            seconds=self.spent.seconds + passed,
            device_seconds=self.spent.device_seconds + passed * num_devices,
        )
        self.spent = replace(spent, is_over=self._budget is not None and _is_over(spent, self._budget))
        if self.spent.is_over or now - self._written_at > _SECONDS_BETWEEN_WRITES:
            self.keep()

    def keep(self) -> None:
        """Write what was spent."""
        self._written_at = time.monotonic()
        write_json(self._folder / _FILE, asdict(self.spent))

    def __call__(self, trial_id: str, result: dict[str, float]) -> bool:
        """Stop no trial by itself."""
        return False

    def stop_all(self) -> bool:
        """Tell whether the budget is spent."""
        return self.spent.is_over


def _is_over(spent: Spent, budget: Budget) -> bool:
    minutes, seconds = budget.minutes, budget.gpu_seconds
    return (minutes is not None and spent.seconds >= 60 * minutes) or (
        seconds is not None and spent.device_seconds >= seconds
    )
