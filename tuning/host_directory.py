"""Owns where hosts are: one actor a device, found by all of its trials.

Trials hold the shares of a device in Ray's books; a host asks for nothing and is put beside them. A directory
actor makes the hosts, so that they outlive trials and end with the sweep; a host that died is replaced when
it is asked for. Loads nothing heavy.
"""

import importlib
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ray

from tuning.device import Device, this_device
from tuning.placement import my_device, nodes_for, on_node, options, this_node

if TYPE_CHECKING:
    from tuning.host import Host, SweepData

_MOST_TRIALS = 64  # of a host at once
_SECONDS_TO_QUEUE = 1.0


class UnfitNodeError(RuntimeError):
    """A node that can't do its part, whichever trial comes."""


class Occupant:
    """A holder of all that trials could have of a node, so that they go elsewhere."""


class HostActor:
    """A tuning.host.Host in a process of its own.

    The heavy libraries load there at once, and the base once there is a plan. `device`: a GPU's number or
    "cpu".
    """

    def __init__(self, device: str, num_threads: int, data: "SweepData | None" = None):
        # Ray's books give it none
        os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device
        self._num_threads, self._begun = num_threads, threading.Event()
        self._error: Exception | None = None
        if data is not None:
            self.begin(data)
        else:
            importlib.import_module("tuning.host")

    def device(self) -> Device:
        """Measure the device that there is to plan for, before `begin`."""
        import torch

        torch.set_num_threads(self._num_threads)
        return replace(this_device(), num_cpus=self._num_threads)

    def begin(self, data: "SweepData") -> None:
        """Load the base; what is asked of the host waits for it."""
        try:
            from tuning.host import Host

            if problem := data.unfit():
                raise UnfitNodeError(": ".join(problem))
            self._host = Host(data, self._num_threads)
        # raised to whoever calls: an actor that fails to start would only say that it died
        except Exception as error:
            self._error = error
        self._begun.set()

    def _has_begun(self) -> bool:
        return self._begun.is_set() and self._error is None

    def _found(self) -> "Host":
        self._begun.wait()
        if self._error is not None:
            raise self._error
        return self._host

    def zero_shot(self) -> list[float]:
        """See Host."""
        return self._found().zero_shot()

    def attach(
        self, trial_id: str, holder: str, config: dict[str, Any], checkpoint: str | None, notes: list[str]
    ) -> list[int]:
        """See Host."""
        return self._found().attach(trial_id, holder, config, checkpoint, notes)

    def advance(self, trial_id: str, step: int, folder: str) -> dict[str, Any]:
        """See Host. For a trial that diverged, `diverged` says why in place of metrics."""
        from qlora.training import DivergedError

        try:
            return self._found().advance(trial_id, step, folder)
        except DivergedError as error:
            return {"diverged": str(error)}

    def stop(self, storage_uri: str) -> int:
        """See Host; a host that has not begun has nothing to keep."""
        from tuning.checkpoints import Storage

        return self._host.stop(Storage.at(storage_uri)) if self._has_begun() else 0

    def detach(self, trial_id: str) -> None:
        """See Host."""
        self._found().detach(trial_id)

    def seconds(self) -> dict[str, float]:
        """See Host; a host that has not begun has done nothing."""
        return self._found().seconds() if self._has_begun() else {}

    def notes(self) -> list[str]:
        """See Host; a host that has not begun has nothing to say."""
        return self._found().notes() if self._has_begun() else []

    def process_id(self) -> int:
        """Return the host's process id."""
        return os.getpid()


class HostDirectory:
    """Makes hosts and knows them. One that died is made again by Ray, without hosts."""

    def __init__(self) -> None:
        self._hosts, self._places = dict[tuple[str, str], Any](), dict[str, tuple[str, str]]()
        self._data: list[Any] = []
        self._left_out = dict[str, Any]()  # by node
        self._notes: list[str] = []

    def host(
        self, node: str, device: str, num_threads: int, trial_id: str | None, data: Sequence[Any]
    ) -> Any:
        """Return the living host of a device (a GPU's number or "cpu") of a node.

        A trial that was elsewhere, as before its process was killed, loses its seat there. `data`: see
        `begin`; empty before hosts have begun.
        """
        self._data = self._data or list(data)
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
                .remote(device, num_threads, *self._data)
            )
            self._hosts[node, device] = found
        return found

    def leave_out(self, node: str, device: str, why: str) -> None:
        """Have trials go elsewhere than to an unfit node, once what they hold of it is free.

        `device`: the kind that they have there, as in `host`. `why` is told with the other notes.
        """
        if node in self._left_out:
            return
        resources: Mapping[str, float] = next(
            (one["Resources"] for one in ray.nodes() if one["NodeID"] == node), {}
        )
        kind = "CPU" if device == "cpu" else "GPU"
        whole = {"CPU": 0.0, "GPU": 0.0, kind: resources.get(kind, 0.0)}
        self._left_out[node] = (
            ray.remote(Occupant).options(**options(whole), scheduling_strategy=on_node(node)).remote()
        )
        self._notes.append(f"{why}; trials went elsewhere")

    def begin(self, data: list[Any]) -> None:
        """Have all hosts begin, those that are there and those to come.

        `data`: a reference to the SweepData, in a list so that Ray passes it on as it is.
        """
        self._data = data
        for host in self._hosts.values():
            host.begin.remote(*data)

    def stop(self, storage_uri: str) -> int:
        """Have all living hosts keep where their trials stand; returns how many trials that were."""
        asked = [host.stop.remote(storage_uri) for host in self._hosts.values()]
        found = 0
        for reply in asked:
            with suppress(ray.exceptions.RayActorError):
                found += ray.get(reply)
        return found

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
        return list(dict.fromkeys([*self._notes, *of_hosts]))

    def _answers(self, question: str) -> list[Any]:
        found = []
        for host in self._hosts.values():
            with suppress(ray.exceptions.RayActorError):
                found.append(ray.get(getattr(host, question).remote()))
        return found


@dataclass(frozen=True)
class Hosts:
    """The hosts of a sweep, as its processes know them: the directory, and a reference to the SweepData.

    data: empty before hosts begin.
    """

    directory: Any
    data: list[Any] = field(default_factory=list)


def start_hosts() -> Hosts:
    """Start a directory for a sweep, on this node.

    Its hosts begin when they are given data (`begin_hosts`). It ends, with its hosts, when the driver does.
    """
    again = {"max_restarts": -1, "max_task_retries": -1}
    directory = ray.remote(HostDirectory).options(num_cpus=0, scheduling_strategy=this_node(), **again)
    return Hosts(directory.remote())


def begin_hosts(hosts: Hosts, data: "SweepData") -> None:
    """Have hosts load their bases."""
    hosts.data.append(ray.put(data))
    ray.get(hosts.directory.begin.remote(hosts.data))


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
    return ray.get(hosts.directory.host.remote(*my_device(), trial_id, hosts.data))


def leave_my_node_out(hosts: Hosts, why: str) -> None:
    """Have trials go elsewhere than to the node of this one, which has to end now."""
    node, device, _ = my_device()
    ray.get(hosts.directory.leave_out.remote(node, device, why))
    time.sleep(_SECONDS_TO_QUEUE)  # Ray's node is to know who comes next


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
