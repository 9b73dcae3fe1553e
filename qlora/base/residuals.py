"""Owns sums that are normalised right away: a layer adds to the residual and normalises the sum at once.

In a decoder layer that normalises what attention and MLP read, each sum with the residual is written to
memory only to be read by the norm behind it. One kernel of Liger's does both. Behind the MLP that norm is the
next layer's, which finds there what it would compute. A family whose layers differ keeps them as they are,
and so does training, in which the kernel's backward takes as long as it saves.

Refuses to know attention and MLPs.

Source: Liger Kernel, https://github.com/linkedin/Liger-Kernel
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora.base.norms import FusedRMSNorm

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
# Adds x and residual [..., n]; returns their norm by a weight [n] and an epsilon, and the sum.
AddAndNormalise = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def fuse_residuals(model: Any, add_and_normalise: AddAndNormalise) -> int:
    """Let decoder layers with fused norms add and normalise at once without gradients; return how many do.

    They are left as they are where that changes more than rounding, or where the kernel fails.
    """
    layers = [one for one in model.modules() if _has_the_parts(one)]
    behind = [*(layer.input_layernorm for layer in layers), _last_norm(model)][1:]
    forwards = [
        partial(_forward, layer, layer.forward, add_and_normalise, norm)
        for layer, norm in zip(layers, behind, strict=True)
    ]
    pairs = zip(layers, forwards, strict=True)
    are_the_same = all(_computes_the_same(layer, forward) for layer, forward in pairs)
    for norm in behind:
        if norm is not None:
            norm.forget()  # what layers that were tried expect
    if not are_the_same:
        return 0
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    return len(layers)


def _has_the_parts(module: Any) -> bool:
    norms = (getattr(module, name, None) for name in ("input_layernorm", "post_attention_layernorm"))
    return {name for name, _ in module.named_children()} == _PARTS and all(
        isinstance(norm, FusedRMSNorm) for norm in norms
    )


def _last_norm(model: Any) -> FusedRMSNorm | None:
    """Return the norm behind the last layer."""
    norm = getattr(model.get_decoder() if hasattr(model, "get_decoder") else model, "norm", None)
    return norm if isinstance(norm, FusedRMSNorm) else None


def _forward(
    layer: Any,
    own: Callable[..., Tensor],
    add_and_normalise: AddAndNormalise,
    next_norm: FusedRMSNorm | None,
    hidden_states: Tensor,
    *others: Any,
    **named: Any,
) -> Tensor:
    """Compute what a layer's own forward does, x + attend(norm(x)), then y + mlp(norm(y))."""
    if torch.is_grad_enabled() or others:
        return own(hidden_states, *others, **named)
    attended, *_ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **named)
    normed, residual = _add(attended, hidden_states, layer.post_attention_layernorm, add_and_normalise)
    out = layer.mlp(normed)
    if next_norm is None:
        return residual + out
    normed, total = _add(out, residual, next_norm, add_and_normalise)
    next_norm.expect(total, normed)
    return total


def _add(
    x: Tensor, residual: Tensor, norm: FusedRMSNorm, add_and_normalise: AddAndNormalise
) -> tuple[Tensor, Tensor]:
    """Return the norm of a sum, and the sum; by two kernels where dtypes differ, as under autocast."""
    if x.dtype == residual.dtype == norm.weight.dtype:
        return add_and_normalise(x, residual, norm.weight, norm.eps)
    total = residual + x
    return norm(total), total


class _HalfFlipped(nn.Module):
    """Stands in for attention while a layer is tried."""

    def forward(self, hidden_states: Tensor, **named: Any) -> tuple[Tensor, None]:
        return hidden_states.flip(-1) / 2, None


@torch.no_grad()
def _computes_the_same(layer: Any, forward: Callable[..., Tensor]) -> bool:
    """Tell whether a layer's forward and another one agree on a random input, but for rounding."""
    weight = layer.input_layernorm.weight
    x = torch.randn(1, 4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    attention = layer.self_attn
    layer.self_attn = _HalfFlipped()
    try:
        expected, found = layer(x).double(), forward(x).double()
    except Exception:  # a layer that needs more than its input, or a kernel that does not fit it
        return False
    finally:
        layer.self_attn = attention
    return bool((found - expected).norm() <= 8 * torch.finfo(weight.dtype).eps * expected.norm())
