"""Owns where hosts are: one actor a device, made when the first trial asks for it, found by all trials of that device.

Trials hold the shares of a device in Ray's books; a host asks for nothing and is put beside them. A directory actor makes
the hosts, so that they outlive trials and end with the sweep; a host that died is replaced when it is asked for. Loads nothing
heavy.
"""

from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:
    from tuning.host import SweepData

_MOST_TRIALS = 64  # of a host at once


class HostActor:
    """A tuning.host.Host in a process of its own, where the heavy libraries load."""

    def __init__(self, data: "SweepData", num_threads: int):
        from tuning.host import Host
        self._host = Host(data, num_threads)

    def zero_shot(self) -> list[float]:
        """See Host."""
        return self._host.zero_shot()

    def attach(self, trial_id: str, holder: str, config: dict[str, Any], checkpoints: list[str]) -> list[int]:
        """See Host."""
        return self._host.attach(trial_id, holder, config, checkpoints)

    def advance(self, trial_id: str, step: int, folder: str) -> dict[str, float]:
        """See Host."""
        return self._host.advance(trial_id, step, folder)

    def detach(self, trial_id: str) -> None:
        """See Host."""
        self._host.detach(trial_id)

    def process_id(self) -> int:
        """See Host."""
        return self._host.process_id()


class HostDirectory:
    """Makes hosts and knows them. `data`: a reference to the SweepData, in a list so that Ray passes it on as it is."""

    def __init__(self, data: list[Any]):
        self._data, self._hosts = data[0], dict[tuple[str, str], Any]()

    def host(self, node: str, device: str, num_threads: int) -> Any:
        """The living host of a device (a GPU's number or "cpu") of a node."""
        found = self._hosts.get((node, device))
        if found is None or _is_dead(found):
            # Ray hides all GPUs from who asks for none, unless told not to; a host sees its own, or none.
            environment = {"CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
            found = ray.remote(HostActor).options(
                num_cpus=0, max_concurrency=_MOST_TRIALS, runtime_env={"env_vars": environment},
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(self._data, num_threads)
            self._hosts[node, device] = found
        return found


def start_hosts(data: "SweepData") -> Any:
    """A directory for a sweep, on this node. It ends, with its hosts, when the driver does."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(HostDirectory).options(num_cpus=0, scheduling_strategy=here).remote([ray.put(data)])


def host_of_my_device(hosts: Any) -> Any:
    """The host of the device that this task or actor holds a share of."""
    context = ray.get_runtime_context()
    node, gpus = context.get_node_id(), ray.get_gpu_ids()
    resources = next(entry["Resources"] for entry in ray.nodes() if entry["NodeID"] == node)
    num_threads = max(1, int(resources.get("CPU", 1) / max(1, resources.get("GPU", 0) if gpus else 1)))
    return ray.get(hosts.host.remote(node, str(gpus[0]) if gpus else "cpu", num_threads))


def _is_dead(host: Any) -> bool:
    try:
        ray.get(host.process_id.remote(), timeout=1)
    except ray.exceptions.GetTimeoutError:  # it is loading
        return False
    except ray.exceptions.RayActorError:
        return True
    return False
