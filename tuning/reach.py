"""Owns whether the nodes that trials may run on reach the place of their checkpoints.

A folder of one machine is not there on another, and a role that may write to a bucket is given to each
machine by itself. Trials that can't write would train up to their first report and be lost.

Refuses to know what is kept there.
"""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qlora.config import InputError, first_line
from tuning.checkpoints import Storage

_NAME = ".reach"  # always the same, since one process works on a place: what a kill leaves is written over


def check_reach(place: str, shares: dict[str, float]) -> None:
    """Raise InputError, naming the node, if one that could hold a trial can't read and write at `place`.

    `place`: a path or URI, which this process can write to. `shares`: what a trial asks Ray for.
    """
    mine = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["NodeID"] != mine and _could_hold(node, shares)]
    if not others:
        return
    storage = Storage.at(place)
    storage.filesystem.create_dir(storage.path)
    _write(storage, _NAME)
    try:
        asked = {node["NodeManagerAddress"]: _ask(node["NodeID"], place) for node in others}
        for address, reply in asked.items():
            if problem := ray.get(reply):
                raise InputError(
                    "storage",
                    f"the node {address} can't read and write at {place} ({problem}), where its trials would "
                    "keep their checkpoints; give a place that all nodes reach, such as "
                    "--set storage=s3://BUCKET/PATH",
                )
    finally:
        storage.filesystem.delete_file(f"{storage.path}/{_NAME}")


def _could_hold(node: dict[str, Any], shares: dict[str, float]) -> bool:
    resources = node["Resources"]
    return bool(node["Alive"]) and all(resources.get(key, 0) >= share for key, share in shares.items())


def _ask(node: str, place: str) -> Any:
    placed = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0)(_problem_here).options(scheduling_strategy=placed).remote(place, node)


def _problem_here(place: str, node: str) -> str:
    """Say why this node can't read and write at a place; nothing if it can."""
    own = f"{_NAME}-{node}"
    try:
        storage = Storage.at(place)
        with storage.filesystem.open_input_stream(f"{storage.path}/{_NAME}") as file:
            file.read()
        _write(storage, own)
        storage.filesystem.delete_file(f"{storage.path}/{own}")
    except Exception as error:  # whatever a store's library raises
        return first_line(error)
    return ""


def _write(storage: Storage, name: str) -> None:
    with storage.filesystem.open_output_stream(f"{storage.path}/{name}") as file:
        file.write(b"here")
