"""Owns the GPU kernels that add to a residual and normalise the sum at once, and their gradient, in Triton.

A row is in registers while all is done that is asked of it: the sum is written and not read again. In the
backward, what comes to the sum from elsewhere is added where the norm's gradient is computed, so that a
residual's gradients need no sums of their own. The weight is frozen and gets no gradient.

Refuses to know layers.

Source: RMSNorm, https://arxiv.org/abs/1910.07467
Shapes: T rows, N numbers of a row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_and_normalise(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add x to the residual [..., N]; return the sum's norm times the weight [N], and the sum.

    Differentiable in x and the residual. All are of one dtype; inside it is float32.
    """
    return _AddAndNormalise.apply(x, residual, weight, eps)  # type: ignore[no-any-return]


class _AddAndNormalise(torch.autograd.Function):
    """The function of x and residual: norm(x + residual) and x + residual."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, residual = x.contiguous(), residual.contiguous()
        total, normed = torch.empty_like(residual), torch.empty_like(residual)
        _add_kernel[(_rows(total),)](x, residual, weight, total, normed, eps, **_options(total))
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return normed, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        d_normed, d_total = grads
        if d_normed is None:
            return d_total, d_total, None, None
        found, d_normed = torch.empty_like(total), d_normed.contiguous()
        _gradient_kernel[(_rows(total),)](
            d_normed,
            d_normed if d_total is None else d_total.contiguous(),
            total,
            weight,
            found,
            ctx.eps,
            WITH_TOTAL=d_total is not None,
            **_options(total),
        )
        return found, found, None, None


def _rows(total: Tensor) -> int:
    return total.numel() // total.shape[-1]


def _options(total: Tensor) -> dict[str, int]:
    width = total.shape[-1]
    block = triton.next_power_of_2(width)
    return {"N": width, "BLOCK_N": block, "num_warps": max(1, min(16, block // 512))}


@triton.jit
def _add_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, total, normed, eps, N: tl.constexpr, BLOCK_N: tl.constexpr
) -> None:
    """Write the sum of one row, and its norm: the norm of the sum as it is rounded."""
    n = tl.arange(0, BLOCK_N)
    place, inside = tl.program_id(0).to(tl.int64) * N + n, n < N
    dtype = total.dtype.element_ty
    row = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    row += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    row = row.to(dtype)
    tl.store(total + place, row, mask=inside)
    row = row.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(row * row, 0) / N + eps)
    w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + place, (row * scale * w).to(dtype), mask=inside)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    d_normed,
    d_total,
    total,
    weight,
    found,
    eps,
    WITH_TOTAL: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Write the gradient of one row of the sum: what comes through its norm, and what comes to itself."""
    n = tl.arange(0, BLOCK_N)
    place, inside = tl.program_id(0).to(tl.int64) * N + n, n < N
    row = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(row * row, 0) / N + eps)
    w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_normed + place, mask=inside, other=0.0).to(tl.float32) * w
    row *= scale
    d = scale * (d - row * (tl.sum(d * row, 0) / N))
    if WITH_TOTAL:
        d += tl.load(d_total + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(found + place, d.to(found.dtype.element_ty), mask=inside)
