"""Owns what a sweep's GPUs cost: planned, and measured over all of its sittings."""

import os
import time

from qlora.cost import Costs, HeldGpus
from tuning.host_directory import Hosts, num_hosts
from workflows.sweep.closing import PRICE
from workflows.sweep.folder import SweepFolder

_FILE = "held.json"


class SweepCost:
    """Counts the time that a sweep's hosts hold GPUs; nothing for a sweep on CPUs.

    A GPU is held from the start of a Ray of one's own, or from when a cluster's first host has it, to the end
    of the proof. Which hosts there are is asked whenever time is counted: `num_devices` to begin with.
    """

    def __init__(self, sweep: SweepFolder, hosts: Hosts, began: float, num_devices: int):
        since = time.monotonic() if os.environ.get("RAY_ADDRESS") else began
        self._space, self._hosts = sweep.space, hosts
        self._held = HeldGpus(sweep.folder / _FILE, since, num_devices)

    def expect(self, gpu_seconds: float) -> None:
        """Take what the whole sweep is expected to take, if it is not known from an earlier sitting."""
        self._held.plan(gpu_seconds)

    def look(self) -> None:
        """Count the time since the last look, for the hosts that there are."""
        self._count(num_hosts(self._hosts))

    def end(self, num_gpus: int | None = None) -> None:
        """Count the time since the last look, by default for as many GPUs as then, and keep it."""
        self._count(num_gpus)
        if self._space.wants_gpu:
            self._held.keep()

    def costs(self) -> Costs | None:
        """Return what the sweep has cost; None on CPUs."""
        return self._held.costs(self._space.price_per_gpu_hour)

    def _count(self, num_gpus: int | None) -> None:
        if self._space.wants_gpu:
            self._held.count(num_gpus)


def cost_summary(costs: Costs | None) -> dict[str, float | None] | None:
    """Return the costs as summary.json has them."""
    return None if costs is None else {**costs.figures, PRICE: costs.measured.price_per_gpu_hour}
