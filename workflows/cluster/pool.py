"""Owns how many engines of a batch job run, on what, and that the connected Ray can run them."""

from collections.abc import Mapping

import ray

from inference.pipeline import Pool
from qlora.base.reference import base_files_digest, base_weights_digest
from qlora.config import InputError
from workflows.cluster.capacity import Capacity, look_at_capacity
from workflows.cluster.nodes import Needs, check_nodes
from workflows.cluster.waiting import wait_for_place

_ENGINE_CPUS = 0.25  # that an engine asks Ray for, beside a GPU
_OTHERS = 2  # of the pipeline's operators ask for as much


def plan_pool(capacity: Capacity, num_workers: int | None = None, device: str | None = None) -> Pool:
    """Plan one engine for each GPU that the connected Ray has now, or for each node if it gets no GPUs.

    `num_workers` and `device` ("cpu" or "gpu") overrule that. Raises InputError for engines that could never
    all be placed.
    """
    gpu, cpu = {"CPU": _ENGINE_CPUS, "GPU": 1.0}, {"CPU": _ENGINE_CPUS}
    num_gpus, most = int(ray.cluster_resources().get("GPU", 0)), capacity.most(gpu)
    on_gpu = device == "gpu" if device else capacity.may_have_gpus(_ENGINE_CPUS)
    asked = gpu if on_gpu else cpu
    if not (capacity.is_there(asked) or capacity.could_come(asked)):
        if device == "gpu":
            mend = "leave it out, or name a cluster in RAY_ADDRESS"
            raise InputError("--device", f"gpu was asked for, but {capacity.describe('GPU')}; {mend}")
        problem = (
            f"{capacity.describe('CPU')} and no GPU, so that no engine has a place; add a node with some"
        )
        raise InputError("RAY_ADDRESS", problem)
    if not on_gpu and (most := capacity.most(cpu)) is not None:
        most = max(1, most - _OTHERS)
    if num_workers and most is not None and num_workers > most:
        need = "a GPU" if on_gpu else f"{_ENGINE_CPUS:g} CPU"
        problem = (
            f"{num_workers} engines need {need} each, and Ray has room for {most} of them; ask for fewer"
        )
        raise InputError("--workers", problem)
    num_nodes = sum(kind.count for kind in capacity.there if kind.resources.get("CPU", 0) >= 1)
    return Pool(num_workers=num_workers or max(1, num_gpus if on_gpu else num_nodes), on_gpu=on_gpu)


def ready_pool(
    local: Mapping[str, float], base: str, num_workers: int | None, device: str | None, timeout_seconds: float
) -> Pool:
    """Plan a pool of engines of a base, wait for the first node, and look whether nodes can do the work.

    `local`: as `connect_ray` returns it. Otherwise see `plan_pool`, `wait_for_place` and `check_nodes`.
    """
    pool = plan_pool(look_at_capacity(local), num_workers, device)
    wait_for_place({"CPU": _ENGINE_CPUS, "GPU": float(pool.on_gpu)}, timeout_seconds)
    check_nodes({"CPU": _ENGINE_CPUS}, Needs(base, base_files_digest(base), base_weights_digest(base)))
    return pool
