"""Owns where Ray is asked to do work: what a task asks for, which nodes could hold it, and which one does.

`shares`, here and elsewhere: what is asked of Ray, as in {"CPU": 1, "GPU": 0.25}. Loads nothing heavy.
"""

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def could_hold(resources: Mapping[str, float], shares: Mapping[str, float]) -> bool:
    """Tell whether an idle node of these resources has room for what asks for `shares`."""
    return all(resources.get(key, 0) >= share for key, share in shares.items())


def nodes_for(shares: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return what Ray says of each living node that could hold what asks for `shares`, if it is idle."""
    return [node for node in ray.nodes() if node["Alive"] and could_hold(node["Resources"], shares)]


def options(shares: Mapping[str, float]) -> dict[str, Any]:
    """Return the options of a task or actor of Ray's that asks for `shares`."""
    others = {key: share for key, share in shares.items() if key not in ("CPU", "GPU")}
    return {"num_cpus": shares["CPU"], "num_gpus": shares["GPU"], "resources": others}


def on_node(node: str) -> NodeAffinitySchedulingStrategy:
    """Return the placement of work that belongs on the node of this id, and fails once that is gone."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def near(node: str) -> NodeAffinitySchedulingStrategy:
    """Return the placement of work that is to be on the node of this id, and elsewhere once that is gone."""
    return NodeAffinitySchedulingStrategy(node, soft=True)


def this_node() -> NodeAffinitySchedulingStrategy:
    """Return the placement of work that belongs on the node of the process that asks for it."""
    return on_node(ray.get_runtime_context().get_node_id())


class Seat:
    """An actor that does nothing but hold a share of a device, for a process that holds none."""

    def device(self) -> tuple[str, str, int]:
        """See `my_device`."""
        return my_device()


def my_device() -> tuple[str, str, int]:
    """Return (node, device, threads that work on it) of the device that this task or actor holds a share of.

    The threads are all of the node's CPUs, or its part of them beside one GPU of several.
    """
    context = ray.get_runtime_context()
    node, gpus = context.get_node_id(), ray.get_gpu_ids()
    resources = next(entry["Resources"] for entry in ray.nodes() if entry["NodeID"] == node)
    num_threads = max(1, int(resources.get("CPU", 1) / max(1, resources.get("GPU", 0) if gpus else 1)))
    return node, str(gpus[0]) if gpus else "cpu", num_threads
