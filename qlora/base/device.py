"""Owns the device that this process computes on: its dtype, its free memory, its kernels, copies to the host.

bfloat16 has float32's range in half the bytes, and GPUs have units for it; most CPUs have none
(https://arxiv.org/abs/1905.12322).

Refuses to know models.
"""

import importlib
import importlib.util
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.config import BaseModelSettings

CPU_PASS_TOKENS = 1152
_GPU_PASS_TOKENS = 8192
_STAGED_BYTES = 64 * 2**20
_ROOM_TO_HOLD = 8  # times what is held, free for any process: several trials report at once, and passes go on


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(settings: BaseModelSettings, device: torch.device) -> torch.dtype:
    """Return the dtype that a model computes in: bfloat16 on GPUs that have it, else float32.

    float32 is also the faster one on CPUs without bfloat16 units. A dtype that `settings` name is taken as it
    is.
    """
    if settings.dtype != "auto":
        return torch.float32 if settings.dtype == "float32" else torch.bfloat16
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def default_token_budget() -> int:
    """Return the number of tokens of one pass that fits this process's device comfortably.

    On a CPU small passes are also the fastest: their memory stays in the cache.
    """
    return _GPU_PASS_TOKENS if default_device().type == "cuda" else CPU_PASS_TOKENS


def unreserved_bytes(device: torch.device) -> int:
    """Return the memory in bytes that no work of this process has reserved on a device.

    On a GPU, recorded passes have memory that is theirs alone, though it is not allocated between them.
    """
    if device.type != "cuda":
        return free_bytes(device)
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def free_bytes(device: torch.device) -> int:
    """Return the memory in bytes that this process may still take on a device.

    On a GPU this is what torch has not allocated. On a CPU it is what is available without swapping, within
    the limit of a container (cgroup v2).
    """
    if device.type == "cuda":
        unallocated = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unallocated
    memory = Path("/proc/meminfo").read_text().splitlines()
    available = next(line for line in memory if line.startswith("MemAvailable"))
    free = int(available.split()[1]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        statistics = dict(
            line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        )
        cached_files = int(
            statistics.get("inactive_file", "0")
        )  # freed by the kernel when memory is asked for
        free = min(free, int(most) - int(used.read_text()) + cached_files)
    return max(0, free)


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host's memory.

    A GPU writes to pinned memory tens of times as fast as to other memory, which is pinned page by page
    for it. So large tensors go through a piece of pinned memory, from which all of this process's threads
    copy on.
    """
    if tensor.device.type != "cuda" or tensor.numel() * tensor.element_size() <= _STAGED_BYTES:
        return tensor.to("cpu", copy=True)
    found = torch.empty(tensor.shape, dtype=tensor.dtype)
    step = _STAGED_BYTES // tensor.element_size()
    staged = torch.empty(step, dtype=tensor.dtype, pin_memory=True)  # torch keeps it for the next one
    pieces = zip(tensor.reshape(-1).split(step), found.view(-1).split(step), strict=True)
    for source, target in pieces:
        target.copy_(staged[: len(source)].copy_(source))
    return found


def hold(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Hold what tensors are now, while they go on to change; returns what brings that to the host's memory.

    On a GPU with room to spare it is copied there, which takes no time, and any thread brings it later,
    beside the work that the GPU has by then. Else it is brought at once.
    """
    device, num_bytes = tensors[0].device, sum(tensor.nbytes for tensor in tensors)
    copies: deque[Tensor] | None = None
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > _ROOM_TO_HOLD * num_bytes:
        with suppress(torch.cuda.OutOfMemoryError):
            copies = deque(tensor.clone() for tensor in tensors)
    if copies is None:
        brought = [to_host(tensor) for tensor in tensors]
        return lambda: brought
    copied = torch.cuda.current_stream(device).record_event()

    def bring() -> list[Tensor]:
        # torch hands few streams out in turn; one of another priority is none that passes are recorded on.
        stream = torch.cuda.Stream(device, priority=-1)
        with torch.cuda.stream(stream):
            stream.wait_event(copied)
            return [to_host(copies.popleft()) for _ in range(len(copies))]

    return bring


def triton_module(name: str) -> Any:
    """Import a module of Triton kernels; return None where Triton is missing.

    Triton comes with CUDA builds of torch.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(name)
