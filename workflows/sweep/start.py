"""Owns the start of a sweep on Ray: hosts load what they need while the driver does the same.

Loads nothing heavy.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from qlora.config import first_line
from tuning.device import Device
from tuning.host_directory import Hosts, ask_all_devices, ask_devices, start_hosts
from tuning.placement import nodes_for
from tuning.space import Space
from workflows.cluster.capacity import Capacity, look_at_capacity
from workflows.cluster.waiting import check_place, wait_for_first
from workflows.session import StoppedError, connect_ray

_SECONDS_FOR_THE_OTHERS = 30.0
_AGAIN = "run the same command again"


@dataclass(frozen=True)
class StartedHosts:
    """A sweep's hosts, questions to them of what devices they have, and when that began (time.monotonic).

    shares: what a trial asks Ray for. capacity: what Ray has room for. asked: the ids of nodes that were
    asked; none while any node will do.
    """

    hosts: Hosts
    questions: list[Any]
    began: float
    shares: dict[str, float]
    capacity: Capacity
    asked: set[str]

    def found_devices(self, timeout_seconds: float) -> list[Device]:
        """Wait for the first device, with words, and a moment for the others; returns those that answered.

        Raises StoppedError if none does within so many seconds, or all nodes that were asked are gone; and
        what a host raised, if none has better news.
        """
        while True:
            wait_for_first(self.questions, self.shares, timeout_seconds, self._ask_newcomers)
            count = len(self.questions)
            ended, busy = ray.wait(
                self.questions, num_returns=count, timeout=_SECONDS_FOR_THE_OTHERS, fetch_local=False
            )
            found, error = good_answers(ended)
            if found:
                for question in busy:  # another's work has them: trials come to them when it is done
                    ray.cancel(question)
                return found
            if not busy:
                assert error is not None, "none was good"
                if isinstance(error, ray.exceptions.RayTaskError):
                    raise error
                raise StoppedError(f"the nodes that were asked are gone ({first_line(error)}); {_AGAIN}")
            self.questions[:] = busy

    def _ask_newcomers(self) -> None:
        """Ask nodes that have joined since, where questions are for certain nodes."""
        new = [node for node in nodes_for(self.shares) if node["NodeID"] not in self.asked]
        if self.asked and new:
            self.asked.update(node["NodeID"] for node in new)
            self.questions.extend(ask_devices(self.hosts, self.shares, "device", new))

    def num_devices(self) -> int:
        """Count the devices that trials may have, there or to come."""
        return self.capacity.num_devices(self.shares)


def good_answers(ended: Sequence[Any]) -> tuple[list[Any], ray.exceptions.RayError | None]:
    """Return what ended tasks have returned, and the last error of one that did not return."""
    found, last = list[Any](), None
    for answer in ended:
        try:
            found.append(ray.get(answer))
        except ray.exceptions.RayError as error:
            last = error
    return found, last


def start(space: Space) -> StartedHosts:
    """Connect Ray and start hosts on all devices of a space.

    Raises InputError if Ray could never place a trial.
    """
    began, shares = time.monotonic(), space.trial_shares()
    capacity = look_at_capacity(connect_ray())
    check_place(capacity, shares)
    hosts, asked = start_hosts(), {node["NodeID"] for node in nodes_for(shares)}
    questions = ask_all_devices(hosts, shares, "device")
    return StartedHosts(hosts, questions, began, shares, capacity, asked)
