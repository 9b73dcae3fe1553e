"""Owns the LoRA products of many adapters over one stream, in plain PyTorch: the CPU's way, and what the GPU's kernels must equal.

Every token belongs to one adapter, whose tokens are consecutive. With dropout mask m, kept with probability 1 - p,

    low  = scale * (x * m / (1 - p)) A'      [T, r]           y = x W' + low B'
    dlow = scale * dy B                      [T, r]           dx = dy W + (dlow A) * m / (1 - p)
    dB  += dy' low                           [out, r]         dA += dlow' (x * m / (1 - p))

so a layer keeps x and low for its backward, and makes m again. Refuses to know models.

Shapes: T stream tokens, R the largest rank of a stream, IN and OUT a layer's widths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_GPU_RANK = 256  # what the kernels of qlora.lora.kernels hold in registers


@dataclass(frozen=True)
class Dropout:
    """The masks of one part of a stream. A row's mask is a function of seed, step, layer and the row's name (the prefix is row 0),
    so it does not change when a step is split otherwise or other trials come and go."""

    p: float
    seed: int
    step: int
    names: tuple[int, ...]
    lengths: tuple[int, ...]

    def kept(self, layer: int, width: int) -> Tensor:
        """Which inputs of a layer are kept: [tokens, width] bool, on the CPU. 2**-16 of p is lost to rounding."""
        limit = round(self.p * 2**16)
        masks = [
            np.random.Generator(np.random.SFC64((self.seed, self.step, layer, name))).integers(
                0, 2**16, (length, width), dtype=np.uint16
            )
            >= limit
            for name, length in zip(self.names, self.lengths, strict=True)
            if length
        ]
        return torch.from_numpy(np.concatenate(masks))

    def token_keys(self) -> np.ndarray:
        """A random 32-bit number for every token, the same however a step is split: [tokens] uint32."""
        names = np.repeat(np.array(self.names, dtype=np.uint64), self.lengths)
        places = np.concatenate([np.arange(length, dtype=np.uint64) for length in self.lengths])
        with np.errstate(over="ignore"):
            base = _mixed(_mixed(np.array([self.seed], dtype=np.uint64)) ^ np.uint64(self.step))
            return (_mixed(base ^ (names << np.uint64(32) | places)) >> np.uint64(32)).astype(np.uint32)


@dataclass(frozen=True)
class LayerPart:
    """One adapter's weights at one layer, A [r, IN], B [OUT, r] and their gradients, for tokens start .. end - 1."""

    start: int
    end: int
    a: Tensor
    b: Tensor
    a_grad: Tensor
    b_grad: Tensor
    scale: float
    dropout: Dropout | None


def add_lora(
    x_TI: Tensor, y_TO: Tensor, parts: Sequence[LayerPart], layer: int
) -> list[tuple[Tensor, Tensor | None]]:
    """Add every part's LoRA product to y in place; returns low and the dropout factors of each part, for `lora_backward`."""
    kept = []
    for part in parts:
        x = x_TI[part.start : part.end]
        factors = None
        if part.dropout is not None:
            factors = part.dropout.kept(layer, x.shape[1])
            x = _dropped(x, factors, part.dropout.p)
        low = (x @ part.a.t()).mul_(part.scale)
        y_TO[part.start : part.end].addmm_(low, part.b.t())
        kept.append((low, factors))
    return kept


def lora_backward(
    x_TI: Tensor,
    dy_TO: Tensor,
    dx_TI: Tensor | None,
    parts: Sequence[LayerPart],
    kept: Sequence[tuple[Tensor, Tensor | None]],
) -> None:
    """Add to the gradients of every part's A and B, and of x if it is given, in place."""
    for part, (low, factors) in zip(parts, kept, strict=True):
        x, dy = x_TI[part.start : part.end], dy_TO[part.start : part.end]
        part.b_grad.addmm_(dy.t().to(part.b_grad.dtype), low.to(part.b_grad.dtype))
        dlow = (dy @ part.b).mul_(part.scale)
        x = x if factors is None or part.dropout is None else _dropped(x, factors, part.dropout.p)
        part.a_grad.addmm_(dlow.t().to(part.a_grad.dtype), x.to(part.a_grad.dtype))
        if dx_TI is None:
            continue
        if factors is None or part.dropout is None:
            dx_TI[part.start : part.end].addmm_(dlow, part.a)
        else:
            dx_TI[part.start : part.end] += _dropped(dlow @ part.a, factors, part.dropout.p)


def _dropped(x: Tensor, kept: Tensor, p: float) -> Tensor:
    return x * kept.to(x.device).to(x.dtype).mul_(1 / (1 - p))


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser. Source: https://doi.org/10.1145/2714064.2660195"""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
