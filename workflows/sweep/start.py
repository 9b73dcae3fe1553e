"""Owns the start of a sweep on Ray: hosts that load what they need while the driver does the same. Loads nothing heavy."""

import time
from dataclasses import dataclass
from typing import Any

from tuning.host_directory import ask_all_devices, start_hosts
from tuning.shares import check_resources, trial_shares
from tuning.space import Space
from workflows.session import connect_ray


@dataclass(frozen=True)
class StartedHosts:
    """A sweep's hosts, references to what devices they have found, and when that began (time.monotonic)."""

    hosts: Any
    devices: list[Any]
    began: float


def start(space: Space) -> StartedHosts:
    """Connect Ray and start hosts on all devices of a space. Raises InputError if Ray could never place a trial."""
    began, available, shares = time.monotonic(), connect_ray(), trial_shares(space)
    check_resources(shares, available)
    hosts = start_hosts()
    return StartedHosts(hosts, ask_all_devices(hosts, shares, "device"), began)
