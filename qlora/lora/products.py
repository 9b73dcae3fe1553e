"""Owns the LoRA products of many adapters over one stream, and their gradients, in plain PyTorch.

This is what runs on a CPU, and what the GPU's kernels (qlora.lora.kernels) must equal. Serving many adapters
on one base in one pass is the idea of Punica (https://arxiv.org/abs/2310.18547); here the adapters are also
trained.

Every token belongs to one adapter, whose tokens are consecutive. With a dropout mask m, which keeps an input
with probability 1 - p,

    low  = scale * (x * m / (1 - p)) A'      [T, r]           y = x W' + low B'
    dlow = scale * dy B                      [T, r]           dx = dy W + (dlow A) * m / (1 - p)
    dB  += dy' low                           [out, r]         dA += dlow' (x * m / (1 - p))

so a layer keeps x and low for its backward.

Refuses to know models.

Shapes: T stream tokens, I (IN) and O (OUT) a layer's widths, r an adapter's rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_GPU_RANK = 256  # what the kernels of qlora.lora.kernels hold in registers


@dataclass(frozen=True)
class Dropout:
    """The dropout masks of one part of a stream.

    A row's mask is a function of seed, step, layer and the row's name; the prefix is row 0. So it does not
    change when a step is split otherwise, or when other trials come and go. lengths: tokens of each row.
    """

    p: float
    seed: int
    step: int
    names: tuple[int, ...]
    lengths: tuple[int, ...]

    def kept(self, layer: int, width: int) -> Tensor:
        """Draw which inputs of a layer are kept: [tokens, width] bool, on the CPU.

        p is rounded to a multiple of 2**-16.
        """
        limit = round(self.p * 2**16)
        masks = []
        for name, length in zip(self.names, self.lengths, strict=True):
            if length:
                generator = np.random.Generator(np.random.SFC64((self.seed, self.step, layer, name)))
                drawn = generator.integers(0, 2**16, (length, width), dtype=np.uint16)
                masks.append(drawn >= limit)
        return torch.from_numpy(np.concatenate(masks))

    def token_keys(self) -> np.ndarray:
        """Hash every token to a 32-bit number, the same however a step is split: [tokens] uint32."""
        names = np.repeat(np.array(self.names, dtype=np.uint64), self.lengths)
        places = np.concatenate([np.arange(length, dtype=np.uint64) for length in self.lengths])
        with np.errstate(over="ignore"):
            base = _mixed(_mixed(np.array([self.seed], dtype=np.uint64)) ^ np.uint64(self.step))
            return (_mixed(base ^ (names << np.uint64(32) | places)) >> np.uint64(32)).astype(np.uint32)


@dataclass(frozen=True)
class LayerPart:
    """One adapter's weights at one layer, A [r, IN] and B [OUT, r], and their gradients.

    They apply to the stream's tokens start .. end - 1.
    """

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
    """Add every part's LoRA product to y in place.

    Returns low [tokens, r] and the dropout mask [tokens, IN] (None without dropout) of each part, for
    `lora_backward`.
    """
    kept = []
    for part in parts:
        x = x_TI[part.start : part.end]
        mask = None
        if part.dropout is not None:
            mask = part.dropout.kept(layer, x.shape[1])
            x = _dropped(x, mask, part.dropout.p)
        low = (x @ part.a.t()).mul_(part.scale)
        y_TO[part.start : part.end].addmm_(low, part.b.t())
        kept.append((low, mask))
    return kept


def lora_backward(
    x_TI: Tensor,
    dy_TO: Tensor,
    dx_TI: Tensor | None,
    parts: Sequence[LayerPart],
    kept: Sequence[tuple[Tensor, Tensor | None]],
) -> None:
    """Add to the gradients of every part's A and B, and to dx if it is given, in place.

    `kept` is what `add_lora` returned.
    """
    for part, (low, mask) in zip(parts, kept, strict=True):
        x = x_TI[part.start : part.end]
        dy = dy_TO[part.start : part.end]
        part.b_grad.addmm_(dy.t().to(part.b_grad.dtype), low.to(part.b_grad.dtype))
        dlow = (dy @ part.b).mul_(part.scale)
        if mask is not None and part.dropout is not None:
            x = _dropped(x, mask, part.dropout.p)
        part.a_grad.addmm_(dlow.t().to(part.a_grad.dtype), x.to(part.a_grad.dtype))
        if dx_TI is None:
            continue
        if mask is None or part.dropout is None:
            dx_TI[part.start : part.end].addmm_(dlow, part.a)
        else:
            dx_TI[part.start : part.end] += _dropped(dlow @ part.a, mask, part.dropout.p)


def _dropped(x: Tensor, kept: Tensor, p: float) -> Tensor:
    """Zero what is not kept, and scale the rest by 1 / (1 - p)."""
    return x * kept.to(x.device).to(x.dtype).mul_(1 / (1 - p))


def _mixed(x: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit numbers by splitmix64's finaliser.

    Source: https://doi.org/10.1145/2714064.2660195
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
