"""Owns what GPUs cost: GPU-seconds and, at a price of a GPU and hour, money in whatever currency that is."""

import math
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from qlora.config import InputError
from qlora.files import read_json, write_json

_SECONDS_OF_AN_HOUR = 3600
_SECONDS_BETWEEN_WRITES = 5.0


@dataclass(frozen=True)
class Cost:
    """Holds GPU-seconds, each GPU counted as a whole, and the price of a GPU and hour, if that is known."""

    gpu_seconds: float
    price_per_gpu_hour: float | None = None

    @property
    def money(self) -> float | None:
        """Return what they cost; None without a price."""
        price = self.price_per_gpu_hour
        return None if price is None else self.gpu_seconds * price / _SECONDS_OF_AN_HOUR

    @property
    def words(self) -> str:
        """Write GPU-seconds and, with a price, money."""
        money, price = self.money, self.price_per_gpu_hour
        priced = "" if money is None else f" ({in_money(money)} at {price:g} a card and hour)"
        return f"{self.gpu_seconds:.0f} GPU-seconds{priced}"


@dataclass(frozen=True)
class Costs:
    """Holds what work on GPUs has cost, and what it was expected to, at one price."""

    measured: Cost
    planned: Cost

    @property
    def figures(self) -> dict[str, float]:
        """Return the figures by name; those of money with a price."""
        found = {
            "gpu_seconds": self.measured.gpu_seconds,
            "planned_gpu_seconds": self.planned.gpu_seconds,
            "money": self.measured.money,
            "planned_money": self.planned.money,
        }
        return {name: round(value, 6) for name, value in found.items() if value is not None}

    @property
    def metrics(self) -> dict[str, float]:
        """Return the figures as metrics of a run."""
        return {f"cost/{name}": value for name, value in self.figures.items()}

    @property
    def lines(self) -> dict[str, str]:
        """Write a line of GPU-seconds and, with a price, one of money, by what it begins with."""
        now, then = self.measured, self.planned
        lines = {"cost": f"{now.gpu_seconds:.0f} GPU-seconds, {then.gpu_seconds:.0f} planned"}
        if now.money is not None and then.money is not None:
            both = f"{in_money(now.money)}, {in_money(then.money)} planned"
            lines["money"] = f"{both}, at {now.price_per_gpu_hour:g} a card and hour"
        return lines


@dataclass(frozen=True)
class _Kept:
    """Holds what HeldGpus knows, as its file has it."""

    gpu_seconds: float = 0.0
    planned: float | None = None


_KEPT = TypeAdapter(_Kept)


class HeldGpus:
    """Counts the time that work holds GPUs, each as a whole, in a file: all of its sittings add up.

    planned: the GPU-seconds that were expected first; None until they are. Time counts from `since`
    (time.monotonic), for `num_gpus` until that is told anew.
    """

    def __init__(self, path: Path, since: float, num_gpus: int):
        self._path, self._since, self._num_gpus, self._written_at = path, since, num_gpus, -math.inf
        kept = _Kept()
        with suppress(FileNotFoundError, InputError, ValidationError):  # none yet, or damaged
            kept = _KEPT.validate_python(read_json(path, ""))
        self.gpu_seconds, self.planned = kept.gpu_seconds, kept.planned

    def plan(self, gpu_seconds: float) -> None:
        """Take what is expected of all sittings together, unless that is known from before."""
        if self.planned is None:
            self.planned = gpu_seconds

    def count(self, num_gpus: int | None = None) -> None:
        """Count the time since the last call, for so many GPUs, by default as many as then."""
        self._num_gpus = self._num_gpus if num_gpus is None else num_gpus
        now = time.monotonic()
        self.gpu_seconds += self._num_gpus * (now - self._since)
        self._since = now
        if now - self._written_at > _SECONDS_BETWEEN_WRITES:
            self.keep()

    def keep(self) -> None:
        """Write what was counted."""
        self._written_at = time.monotonic()
        write_json(self._path, asdict(_Kept(self.gpu_seconds, self.planned)), "held GPUs")

    def costs(self, price_per_gpu_hour: float | None) -> Costs | None:
        """Return what was counted beside what was expected; None if no GPU was held, or nothing expected."""
        if not self.gpu_seconds or self.planned is None:
            return None
        return Costs(Cost(self.gpu_seconds, price_per_gpu_hour), Cost(self.planned, price_per_gpu_hour))


def in_money(amount: float) -> str:
    """Write an amount with two digits behind the point, or with two that count if it is small."""
    if amount >= 0.1 or amount < 1e-6:
        return f"{amount:.2f}"
    return f"{amount:.{1 - math.floor(math.log10(amount))}f}"
