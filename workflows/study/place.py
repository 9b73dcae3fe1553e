"""Owns where a study's steps run: on a GPU if there is one or may come, else on CPUs."""

from collections.abc import Mapping

from qlora.base.reference import resolve_base
from workflows.cluster.capacity import look_at_capacity
from workflows.cluster.nodes import Needs, check_nodes
from workflows.cluster.waiting import check_place, wait_for_place
from workflows.study.settings import Study


def place_of_steps(study: Study, digests: Mapping[str, str], local: Mapping[str, float]) -> dict[str, float]:
    """Return what a step asks Ray for, once a node for it is there.

    `digests`: of a local base, as a prepared study has them. `local`: as `connect_ray` returns it. Raises
    InputError if no node could do a step, StoppedError if none comes.
    """
    capacity = look_at_capacity(local)
    shares = {"CPU": 1.0, "GPU": float(capacity.may_have_gpus(1.0))}
    check_place(capacity, shares, "RAY_ADDRESS")
    wait_for_place(shares, study.start_timeout)
    is_local = resolve_base(study.base_model.name).kind == "local"
    files, weights = (digests.get(key) if is_local else None for key in ("base", "base_weights"))
    check_nodes(shares, Needs(study.base_model.name, files, weights))
    return shares
