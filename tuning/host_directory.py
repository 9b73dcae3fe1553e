"""Owns where hosts are: one actor a device, found by all of its trials.

Trials hold the shares of a device in Ray's books; a host asks for nothing and is put beside them. A directory
actor makes the hosts, so that they outlive trials and end with the sweep; a host that died is replaced when
it is asked for. Loads nothing heavy.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray

from tuning.host_actor import HostActor
from tuning.placement import my_device, nodes_for, on_node, options, this_node

if TYPE_CHECKING:
    from tuning.host import SweepData

_MOST_TRIALS = 64  # of a host at once
_SECONDS_TO_QUEUE, _SECONDS_TO_TELL = 1.0, 5.0


class Occupant:
    """A holder of what a trial could have of an unfit node, so that trials go elsewhere."""


class HostDirectory:
    """Makes hosts and knows them. One that died is made again by Ray, without hosts."""

    def __init__(self) -> None:
        self._hosts, self._places = dict[tuple[str, str], Any](), dict[str, tuple[str, str]]()
        self._orders: list[Any] = []
        self._left_out = dict[str, str]()  # why, by node
        self._occupants: list[Any] = []

    def host(
        self, node: str, device: str, num_threads: int, trial_id: str | None, orders: Sequence[Any]
    ) -> Any:
        """Return the living host of a device (a GPU's number or "cpu") of a node.

        A trial that was elsewhere, as before its process was killed, loses its seat there. `orders`:
        see `Hosts`.
        """
        self._orders = self._orders or list(orders)
        before = self._places.get(trial_id or "")
        if before is not None and before != (node, device) and before in self._hosts:
            self._hosts[before].detach.remote(trial_id)
        if trial_id is not None:
            self._places[trial_id] = node, device
        found = self._hosts.get((node, device))
        if found is None or _is_dead(found):
            found = (
                ray.remote(HostActor)
                .options(num_cpus=0, max_concurrency=_MOST_TRIALS, scheduling_strategy=on_node(node))
                .remote(device, num_threads, self._orders)
            )
            self._hosts[node, device] = found
        return found

    def leave_out(self, node: str, shares: Mapping[str, float], why: str) -> None:
        """Have trials go elsewhere than to an unfit node: each share is taken as it falls free.

        `shares`: what a trial asks Ray for. `why` is told with the other notes.
        """
        if node in self._left_out:
            return
        self._left_out[node] = why
        whole: Mapping[str, float] = next(
            (one["Resources"] for one in ray.nodes() if one["NodeID"] == node), {}
        )
        rooms = (int(whole.get(key, 0) / share + 1e-6) for key, share in shares.items() if share)
        occupant = ray.remote(Occupant).options(**options(shares), scheduling_strategy=on_node(node))
        self._occupants += [occupant.remote() for _ in range(min(_MOST_TRIALS, min(rooms, default=0)))]

    def why_none_is_fit(self, shares: Mapping[str, float]) -> str:
        """Say why the living nodes are unfit, if there are some and all are; nothing otherwise."""
        living = [node["NodeID"] for node in nodes_for(shares)]
        return self._left_out[living[0]] if living and set(living) <= self._left_out.keys() else ""

    def unfit_nodes(self) -> set[str]:
        """Return the nodes that trials were told to leave out."""
        return set(self._left_out)

    def num_devices_of(self, trial_ids: Sequence[str]) -> int:
        """Count the devices that these trials are on, as far as they have come to one."""
        return len({self._places[trial_id] for trial_id in trial_ids if trial_id in self._places})

    def num_hosts(self) -> int:
        """Count the hosts, each of which has a device."""
        return len(self._hosts)

    def begin(self, orders: list[Any]) -> None:
        """Have all hosts begin, those that are there and those to come. `orders`: see `Hosts`."""
        self._orders = orders
        for host in self._hosts.values():
            host.begin.remote(orders)

    def end(self, trial_id: str) -> None:
        """Have a trial end at its next step, wherever it is."""
        for host in self._hosts.values():
            host.end.remote(trial_id)

    def set_aside(self, trial_id: str, storage_uri: str) -> None:
        """Have a trial leave its seat at its next step, to go on from there later."""
        for host in self._hosts.values():
            host.set_aside.remote(trial_id, storage_uri)

    def stop(self, storage_uri: str) -> int:
        """Have all living hosts keep where their trials stand; returns how many trials that were."""
        asked = [host.stop.remote(storage_uri) for host in self._hosts.values()]
        found = 0
        for reply in asked:
            with suppress(ray.exceptions.RayActorError):
                found += ray.get(reply)
        return found

    def fit_host(self) -> Any:
        """Return a host that lives and can do its part, once it has begun; None if there is none."""
        for host in self._hosts.values():
            with suppress(ray.exceptions.RayActorError):
                if ray.get(host.is_fit.remote()):
                    return host
        return None

    def seconds(self) -> dict[str, float]:
        """Return where the time of all living hosts together went, by kind of work.

        The kinds are those of tuning.shared_work.WORK.
        """
        found: Counter[str] = Counter()
        for seconds in self._answers("seconds"):
            found.update(seconds)
        return dict(found)

    def notes(self) -> list[str]:
        """Return what people should know of how the living hosts' work went, each thing once."""
        of_hosts = (note for notes in self._answers("notes") for note in notes)
        left_out = (f"{why}; trials went elsewhere" for why in self._left_out.values())
        return list(dict.fromkeys([*left_out, *of_hosts]))

    def _answers(self, question: str) -> list[Any]:
        found = []
        for host in self._hosts.values():
            with suppress(ray.exceptions.RayActorError):
                found.append(ray.get(getattr(host, question).remote()))
        return found


@dataclass(frozen=True)
class Hosts:
    """The hosts of a sweep, as its processes know them: the directory, and what they begin with.

    orders: references to a question to their node, which returns what is to blame and why it can't do its
    part, or None, and to the SweepData. They stand in a list so that Ray hands them on as they are: to load
    them takes libraries that trials do without. Empty before they begin.
    """

    directory: Any
    orders: list[Any] = field(default_factory=list)


def start_hosts() -> Hosts:
    """Start a directory for a sweep, on this node.

    Its hosts begin when they are given data (`begin_hosts`). It ends, with its hosts, when the driver does.
    """
    again = {"max_restarts": -1, "max_task_retries": -1}
    directory = ray.remote(HostDirectory).options(num_cpus=0, scheduling_strategy=this_node(), **again)
    return Hosts(directory.remote())


def begin_hosts(
    hosts: Hosts, data: "SweepData", unfit: Callable[[], tuple[str, str] | None] = lambda: None
) -> None:
    """Have hosts load their bases. `unfit`: see `Hosts`."""
    hosts.orders.extend([ray.put(unfit), ray.put(data)])
    ray.get(hosts.directory.begin.remote(hosts.orders))


def host_seconds(hosts: Hosts) -> dict[str, float]:
    """Return where the hosts' time went, in seconds of all of them together by kind of work.

    The kinds are those of tuning.shared_work.WORK.
    """
    found: dict[str, float] = ray.get(hosts.directory.seconds.remote())
    return found


def host_notes(hosts: Hosts) -> list[str]:
    """Return what people should know of how the hosts' work went."""
    found: list[str] = ray.get(hosts.directory.notes.remote())
    return found


def ask_a_host(hosts: Hosts, question: str, *arguments: Any) -> Any:
    """Ask a host that can do its part; returns a reference to the answer. `question`: a method of HostActor.

    It asks Ray for nothing, so it is for when trials have ended. Raises RayError if there is no such host.
    """
    host = ray.get(hosts.directory.fit_host.remote()) if hosts.orders else None
    if host is None:
        raise ray.exceptions.RayError("no host is left that can do it")
    return getattr(host, question).remote(*arguments)


class DeviceCount:
    """Counts the devices that trials are on, without waiting: it answers what it knows."""

    def __init__(self, hosts: Hosts):
        self._hosts, self._known = hosts, 0
        self._asked: Any = None

    def __call__(self, trial_ids: Sequence[str]) -> int:
        """Return how many devices the trials were on when the last answer came; 0 before there is one."""
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            with suppress(ray.exceptions.RayError):
                self._known = ray.get(self._asked)
            self._asked = None
        if self._asked is None:
            self._asked = self._hosts.directory.num_devices_of.remote(list(trial_ids))
        return self._known


def end_trial(hosts: Hosts, trial_id: str) -> None:
    """Have a trial end at its next step, wherever it is. Returns at once."""
    hosts.directory.end.remote(trial_id)


def set_trial_aside(hosts: Hosts, storage_uri: str, trial_id: str) -> None:
    """Have a trial leave its seat at its next step, to go on from there later. Returns at once."""
    hosts.directory.set_aside.remote(trial_id, storage_uri)


def ask_where_trials_stand(hosts: Hosts, storage_uri: str) -> Any:
    """Have hosts stop, and put a checkpoint of each trial that is between two reports into the storage.

    Returns what to wait for.
    """
    return hosts.directory.stop.remote(storage_uri)


def wait_until_kept(kept: Any, timeout_seconds: float) -> None:
    """Wait until hosts have kept where trials stand, but no longer; then the last reports remain."""
    with suppress(ray.exceptions.RayError):
        ray.get(kept, timeout=timeout_seconds)


def stop_hosts(hosts: Hosts) -> None:
    """End a directory; its hosts end with it and give their devices' memory back."""
    ray.kill(hosts.directory)


def ask_all_devices(hosts: Hosts, shares: dict[str, float], question: str) -> list[Any]:
    """Ask the host of each device that trials could have a share of; returns references to the answers.

    All are asked at once, since any would wait for the first. Devices are GPUs or, if trials need none, the
    CPUs of a node. While no node could hold a trial there is one question, which an autoscaler takes for a
    wish. `question`: a method of HostActor. `shares`: what a trial asks Ray for.
    """
    return ask_devices(hosts, shares, question, nodes_for(shares)) or [
        _asking(shares, question).remote(hosts)
    ]


def ask_devices(
    hosts: Hosts, shares: dict[str, float], question: str, nodes: Sequence[Mapping[str, Any]]
) -> list[Any]:
    """Ask the host of each device of some nodes, as `ask_all_devices` does for all."""
    task = _asking(shares, question)
    placed = [
        on_node(node["NodeID"])
        for node in nodes
        for _ in range(int(node["Resources"]["GPU"]) if shares["GPU"] else 1)
    ]
    return [task.options(scheduling_strategy=place).remote(hosts) for place in placed]


def _asking(shares: dict[str, float], question: str) -> Any:
    """Return a task of Ray's that asks the host of a whole device a question."""

    def ask(hosts: Hosts) -> Any:
        return ray.get(getattr(host_of_my_device(hosts), question).remote())

    whole = {**shares, "GPU": max(1, shares["GPU"]) if shares["GPU"] else 0}
    return ray.remote(**options(whole))(ask)


def host_of_my_device(hosts: Hosts, trial_id: str | None = None) -> Any:
    """Return the host of the device that this task, or the actor of a trial, holds a share of."""
    return ray.get(hosts.directory.host.remote(*my_device(), trial_id, hosts.orders))


def leave_my_node_out(hosts: Hosts, shares: Mapping[str, float], why: str) -> None:
    """Have trials go elsewhere than to the node of this one, which has to end now."""
    ray.get(hosts.directory.leave_out.remote(my_device()[0], shares, why))
    time.sleep(_SECONDS_TO_QUEUE)  # Ray's node is to know who comes next


def why_no_node_is_fit(hosts: Hosts, shares: Mapping[str, float]) -> str:
    """Say why all nodes that trials could go to are unfit; nothing if one is not, or it can't be told."""
    with suppress(ray.exceptions.RayError):
        return str(ray.get(hosts.directory.why_none_is_fit.remote(shares), timeout=_SECONDS_TO_TELL))
    return ""


def unfit_nodes(hosts: Hosts) -> set[str]:
    """Return the nodes that trials were told to leave out; none if it can't be told."""
    with suppress(ray.exceptions.RayError):
        return set(ray.get(hosts.directory.unfit_nodes.remote(), timeout=_SECONDS_TO_TELL))
    return set()


def num_hosts(hosts: Hosts) -> int | None:
    """Count the hosts of a sweep, each of which has a device; None if it can't be told."""
    with suppress(ray.exceptions.RayError):
        return int(ray.get(hosts.directory.num_hosts.remote(), timeout=_SECONDS_TO_TELL))
    return None


def _is_dead(host: Any) -> bool:
    try:
        ray.get(host.process_id.remote(), timeout=1)
    except ray.exceptions.GetTimeoutError:  # it is loading
        return False
    except ray.exceptions.ActorUnavailableError:  # for a moment
        return False
    except ray.exceptions.ActorDiedError:
        return True
    return False
