"""Owns what a sweep's GPUs cost from its start to its end: planned, and measured over all sittings."""

import time
from pathlib import Path

from qlora.cost import Cost, Costs
from tuning.space import Space
from tuning.spending import Spent, spend_besides
from workflows.sweep.closing import PRICE


class HeldDevices:
    """Counts the time that a sweep holds devices while none of its trials runs, in its folder.

    since: when that began (time.monotonic).
    """

    def __init__(self, folder: Path, since: float):
        self._folder, self._since = folder, since

    def begin(self) -> None:
        """Begin to count anew: trials ran until now, whose time counts by itself."""
        self._since = time.monotonic()

    def count(self, num_devices: int) -> Spent:
        """Count the time since the last call, for so many devices; returns all that was spent so far."""
        since, self._since = self._since, time.monotonic()
        return spend_besides(self._folder, (self._since - since) * num_devices)


def costs_of(space: Space, spent: Spent, planned_gpu_seconds: float) -> Costs | None:
    """Return what a sweep has cost and was expected to; None if its trials ask for no GPU."""
    if not space.wants_gpu:
        return None
    price = space.price_per_gpu_hour
    return Costs(Cost(spent.in_all, price), Cost(planned_gpu_seconds, price))


def cost_summary(costs: Costs | None) -> dict[str, float | None] | None:
    """Return the costs as summary.json has them."""
    return None if costs is None else {**costs.figures, PRICE: costs.measured.price_per_gpu_hour}
