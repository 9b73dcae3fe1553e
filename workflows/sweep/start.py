"""Owns the start of a sweep on Ray: hosts load what they need while the driver does the same.

Loads nothing heavy.
"""

import time
from dataclasses import dataclass
from typing import Any

from qlora.config import InputError
from tuning.host_directory import Hosts, ask_all_devices, start_hosts
from tuning.space import Space
from workflows.session import connect_ray


@dataclass(frozen=True)
class StartedHosts:
    """A sweep's hosts, references to what devices they have found, and when that began (time.monotonic)."""

    hosts: Hosts
    devices: list[Any]
    began: float


def start(space: Space) -> StartedHosts:
    """Connect Ray and start hosts on all devices of a space.

    Raises InputError if Ray could never place a trial.
    """
    began, available, shares = time.monotonic(), connect_ray(), space.trial_shares()
    check_resources(shares, available)
    hosts = start_hosts()
    return StartedHosts(hosts, ask_all_devices(hosts, shares, "device"), began)


def check_resources(shares: dict[str, float], available: dict[str, float]) -> None:
    """Raise InputError if no trial could ever be placed on a Ray of these resources.

    No resources mean a cluster that may grow.
    """
    if not available:
        return
    for name, wanted in shares.items():
        there = available.get(name, 0)
        if wanted > there:
            mend = f"lower it with --set resources_per_trial.{name.lower()}=N"
            if name == "GPU":
                mend += " --set trials_per_gpu=null"
            raise InputError(
                "resources_per_trial", f"a trial asks for {wanted:g} {name}, but Ray has {there:g}; {mend}"
            )
