"""Owns the start of a sweep on Ray: hosts load what they need while the driver does the same.

Loads nothing heavy.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from tuning.device import Device
from tuning.host_directory import Hosts, ask_all_devices, start_hosts
from tuning.space import Space
from workflows.cluster.capacity import Capacity, look_at_capacity
from workflows.cluster.waiting import check_place, wait_for_first
from workflows.session import connect_ray

_SECONDS_FOR_THE_OTHERS = 30.0


@dataclass(frozen=True)
class StartedHosts:
    """A sweep's hosts, references to what devices they have found, and when that began (time.monotonic).

    shares: what a trial asks Ray for. capacity: what Ray has room for.
    """

    hosts: Hosts
    devices: list[Any]
    began: float
    shares: Mapping[str, float]
    capacity: Capacity

    def found_devices(self, timeout_seconds: float) -> list[Device]:
        """Wait for the first device, with words, and a moment for the others; returns those that answered.

        Raises StoppedError if none does within so many seconds.
        """
        wait_for_first(self.devices, self.shares, timeout_seconds)
        ended, busy = ray.wait(
            self.devices, num_returns=len(self.devices), timeout=_SECONDS_FOR_THE_OTHERS, fetch_local=False
        )
        for question in busy:  # another's work has them: trials come to them when it is done
            ray.cancel(question)
        return ray.get(ended)

    def num_devices(self) -> int:
        """Count the devices that trials may have, there or to come."""
        return self.capacity.num_devices(self.shares)


def start(space: Space) -> StartedHosts:
    """Connect Ray and start hosts on all devices of a space.

    Raises InputError if Ray could never place a trial.
    """
    began, shares = time.monotonic(), space.trial_shares()
    capacity = look_at_capacity(connect_ray())
    check_place(capacity, shares)
    hosts = start_hosts()
    return StartedHosts(hosts, ask_all_devices(hosts, shares, "device"), began, shares, capacity)
