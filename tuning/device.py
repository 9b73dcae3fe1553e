"""Owns the device that a plan is made for: its kind and its speeds, measured in the process that has it.

Loads nothing heavy, so that what is known of a device passes through processes that don't.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qlora.config import BaseModelSettings
from qlora.provenance import hardware
from tuning.space import Space


@dataclass(frozen=True)
class Device:
    """A device that trials of a host run on.

    free_bytes: memory that is free there. speed: operations a second in products of matrices, in bfloat16 if
    it has that. bandwidth: bytes a second that are read and written. num_cpus: that Ray gives trials there.
    fuses_mlp: Liger's kernels are there, which keep less of a gated MLP.
    """

    kind: str
    free_bytes: int
    speed: float
    has_bfloat16: bool = False
    name: str = ""
    bandwidth: float = math.inf
    num_cpus: int = field(default_factory=lambda: os.cpu_count() or 1)
    fuses_mlp: bool = False


def this_device(kind: str | None = None) -> Device:
    """Measure this process's GPU or CPU, the GPU if there is one unless a kind is given.

    Its speeds are those of products of two matrices and of copies of one (a tenth of a second).
    """
    import torch

    from qlora.base.device import compute_dtype, default_device, free_bytes
    from qlora.base.fused import has_liger

    device = torch.device(kind) if kind else default_device()
    dtype = compute_dtype(BaseModelSettings(), device)
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # the process's own random state stays as it is
    a = torch.randn(size, size, generator=generator, device=device, dtype=dtype)
    product, copy = _shortest_seconds(lambda: a @ a), _shortest_seconds(lambda: a.clone())
    return Device(
        device.type,
        free_bytes(device),
        2 * size**3 / product,
        dtype == torch.bfloat16,
        hardware(device.type),
        2 * a.nbytes / copy,
        fuses_mlp=device.type == "cuda" and has_liger(),
    )


def device_here(space: Space) -> Device | None:
    """Measure the device of this machine that trials of this space would have.

    Returns None if the machine has no GPU and the space wants one.
    """
    import torch

    if not space.wants_gpu:
        return this_device("cpu")
    return this_device("cuda") if torch.cuda.is_available() else None


def _shortest_seconds(work: Callable[[], Any]) -> float:
    def measured() -> float:
        started = time.perf_counter()
        work()[0, 0].item()
        return time.perf_counter() - started

    return min(measured() for _ in range(4))
