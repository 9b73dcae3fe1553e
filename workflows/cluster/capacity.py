"""Owns what a Ray has room for: its nodes, and those that an autoscaler may bring.

Ray itself tells no driver how far a cluster may grow. Its autoscaler goes by a file on the head or, under
KubeRay, by the RayCluster that the head's service account may read; so the head is asked.

Sources: https://docs.ray.io/en/latest/cluster/vms/references/ray-cluster-configuration.html
https://docs.ray.io/en/latest/cluster/kubernetes/user-guides/configuring-autoscaling.html
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from qlora.config import InputError
from tuning.placement import could_hold, on_node

_OPTION = "--autoscaling-config="
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
ACCELERATOR = "accelerator_type:"
_SECONDS_TO_ANSWER = 180  # Ray takes 60 to find that a process did not start, and tries again
_HEAD = "node:__internal_head__"


@dataclass(frozen=True)
class NodeKind:
    """Nodes that are alike. resources: of each of them. count: how many there are, or may be."""

    resources: Mapping[str, float]
    count: int

    def could_hold(self, shares: Mapping[str, float]) -> bool:
        """Tell whether an idle node of this kind has room for what asks for `shares`."""
        return self.count > 0 and could_hold(self.resources, shares)


@dataclass(frozen=True)
class Capacity:
    """The nodes that a Ray has and may have.

    there: those that are alive, one by one. may_come: kinds that an autoscaler brings, up to so many of each,
    those included that it has brought. most_workers: of all those kinds together. grows: whether there is
    an autoscaler; one that grows without `may_come` doesn't tell how far.
    """

    there: tuple[NodeKind, ...]
    may_come: tuple[NodeKind, ...] = ()
    most_workers: int = 0
    grows: bool = False

    def is_there(self, shares: Mapping[str, float]) -> bool:
        """Tell whether a node that is alive could hold what asks for `shares`."""
        return any(kind.could_hold(shares) for kind in self.there)

    def could_come(self, shares: Mapping[str, float]) -> bool:
        """Tell whether a node that could hold it may come, as far as that is known."""
        if self.grows and not self.may_come:
            return True
        return self.most_workers > 0 and any(kind.could_hold(shares) for kind in self.may_come)

    def most(self, shares: Mapping[str, float]) -> int | None:
        """Return how many could be held at once by what is there or may come; None if nobody knows."""
        if self.grows and not self.may_come:
            return None
        now = self._held_now(shares)
        later, room = 0, self.most_workers
        for kind in sorted(self.may_come, key=lambda kind: -_held(kind.resources, shares)):
            count = min(kind.count, room)
            later, room = later + count * _held(kind.resources, shares), room - count
        heads = sum(_held(kind.resources, shares) for kind in self.there if _HEAD in kind.resources)
        return max(now, heads + later)

    def may_have_gpus(self, cpus: float) -> bool:
        """Tell whether there are GPUs beside so many CPUs, or may come.

        Where that isn't known, whether there are no such CPUs either.
        """
        asked = {"CPU": cpus, "GPU": 1.0}
        most = self.most(asked)
        if most is None:
            return self.is_there(asked) or not self.is_there({"CPU": cpus})
        return most > 0

    def num_devices(self, shares: Mapping[str, float]) -> int:
        """Count the devices, there or to come, that trials could have a share of: GPUs, or nodes' CPUs."""
        here = tuple(kind for kind in self.there if kind.could_hold(shares))
        to_come = tuple(kind for kind in self.may_come if kind.could_hold(shares))
        if not shares.get("GPU"):
            return max(1, len(here), min(self.most_workers, sum(kind.count for kind in to_come)))
        gpus = {"GPU": 1.0}
        able = Capacity(here, to_come, self.most_workers, grows=bool(to_come))
        return max(1, able.most(gpus) or 0)

    def _held_now(self, shares: Mapping[str, float]) -> int:
        return sum(_held(kind.resources, shares) * kind.count for kind in self.there)

    def describe(self, resource: str) -> str:
        """Say how much of a resource there is and may be, as in `Ray has 0 GPU and may have 8`."""
        now = sum(kind.resources.get(resource, 0) * kind.count for kind in self.there)
        most = self.most({resource: 1})
        return f"Ray has {now:g} {resource}" + (f" and may have {most}" if self.grows and most else "")


def _held(resources: Mapping[str, float], shares: Mapping[str, float]) -> int:
    """Return how many of what asks for `shares` a node of these resources holds."""
    counts = [int(resources.get(key, 0) / share + 1e-6) for key, share in shares.items() if share]
    return min(counts, default=1)


def look_at_capacity(local: Mapping[str, float]) -> Capacity:
    """Look at what the connected Ray has and may have. `local`: as `connect_ray` returns it."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    there = tuple(NodeKind(node["Resources"], 1) for node in nodes)
    if local:
        return Capacity(there)
    heads = [node["NodeID"] for node in nodes if _HEAD in node["Resources"]]
    if not heads:
        return Capacity(there)
    task = ray.remote(num_cpus=0)(_autoscaling_config).options(scheduling_strategy=on_node(heads[0]))
    address = ray.get_runtime_context().gcs_address
    try:
        config = ray.get(task.remote(address), timeout=_SECONDS_TO_ANSWER)
    except ray.exceptions.GetTimeoutError:
        problem = f"its head took no work within {_SECONDS_TO_ANSWER} s; see `ray status` there"
        raise InputError("RAY_ADDRESS", problem) from None
    except ray.exceptions.RayError:  # a head without what this project needs, which its nodes may have
        config = {}
    return Capacity(there) if config is None else with_autoscaler(there, config)


def with_autoscaler(there: tuple[NodeKind, ...], config: Mapping[str, Any]) -> Capacity:
    """Return the capacity of nodes and of an autoscaler that goes by `config`, {} if that is not known."""
    head_type, types = config.get("head_node_type"), config.get("available_node_types", {})
    limit = config.get("max_workers")
    may_come = tuple(
        NodeKind(kind["resources"], int(kind.get("max_workers", limit or 0)))
        for name, kind in types.items()
        if kind.get("resources") and (name != head_type or kind.get("max_workers"))
    )
    in_all = sum(kind.count for kind in may_come)
    return Capacity(there, may_come, in_all if limit is None else min(in_all, int(limit)), grows=True)


def _autoscaling_config(gcs_address: str) -> dict[str, Any] | None:
    """Return what the autoscaler of this head goes by, {} if that can't be read, None if there is none."""
    import psutil
    import yaml

    port = gcs_address.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        is_ours = any(word.startswith("--gcs-address=") and word.endswith(f":{port}") for word in words)
        paths = [word.removeprefix(_OPTION) for word in words if word.startswith(_OPTION)]
        if is_ours and paths:
            with suppress(OSError, yaml.YAMLError):
                return _whole(yaml.safe_load(Path(paths[0]).expanduser().read_text(encoding="utf-8")))
            return {}
    if (name := os.environ.get("RAY_CLUSTER_NAME")) and _NAMESPACE.exists():  # KubeRay's head
        return kuberay_config(name, _NAMESPACE.read_text(encoding="utf-8").strip())
    return None


def kuberay_config(name: str, namespace: str) -> dict[str, Any] | None:
    """Return what the autoscaler of a RayCluster goes by, {} if it can't be read, None if it has none."""
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    try:
        producer = AutoscalingConfigProducer(name, namespace)
        cluster = producer.kubernetes_api_client.get(f"rayclusters/{name}")
        if not cluster["spec"].get("enableInTreeAutoscaling"):
            return None
        return _whole(producer())
    except Exception:  # no right to read it, no answer: it may grow, and nobody says how far
        return {}


def _whole(config: Any) -> dict[str, Any]:
    """Return an autoscaler's config as plain data, {} for what is none."""
    return config if isinstance(config, dict) else {}
