"""Owns sums that are normalised right away: a layer adds to the residual and normalises the sum at once.

In a decoder layer that normalises what attention and MLP read, each sum with the residual is written to
memory only to be read by the norm behind it. One kernel of Liger's does both. Behind the MLP that norm is the
next layer's, which finds there what it would compute. A family whose layers differ keeps them as they are,
and so does training, in which the kernel's backward takes as long as it saves.

Refuses to know attention and MLPs.

Source: Liger Kernel, https://github.com/linkedin/Liger-Kernel
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora.base.norms import FusedRMSNorm

_log = logging.getLogger(__name__)
_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
# Adds x and residual [..., n]; returns their norm by a weight [n] and an epsilon, and the sum.
AddAndNormalise = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def fuse_residuals(model: Any, add_and_normalise: AddAndNormalise) -> int:
    """Let decoder layers with fused norms add and normalise at once without gradients; return how many do.

    A layer is left as it is where that changes more than rounding, and all are where the kernel fails.
    """
    layers = [one for one in model.modules() if _has_the_parts(one)]
    behind = [*(layer.input_layernorm for layer in layers), _last_norm(model)][1:]
    fused = dict[Any, Callable[..., Tensor]]()
    for layer, norm in zip(layers, behind, strict=True):
        forward = partial(_forward, layer, layer.forward, add_and_normalise, norm)
        try:
            if _computes_the_same(layer, forward):
                fused[layer] = forward
        except Exception as error:  # whatever a version of the kernel makes of a device that it does not fit
            _log.warning("sums with the residual and norms stay in two kernels: %s", error)
            return 0
        finally:
            if norm is not None:
                norm.forget()  # what the layer, when it was tried, had it expect
    for layer, found in fused.items():
        layer.forward = found
    return len(fused)


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
    del attended  # the MLP takes the most memory
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


class _Known(nn.Module):
    """Stands in for attention, or for an MLP, while a layer is tried: notes what it is given."""

    def __init__(self, known: Any):
        super().__init__()
        self.known, self.given = known, list[Tensor]()

    def forward(self, hidden_states: Tensor, **named: Any) -> Any:
        self.given.append(hidden_states)
        return self.known


@torch.no_grad()
def _computes_the_same(layer: Any, forward: Callable[..., Tensor]) -> bool:
    """Tell whether a layer's own forward and another one agree.

    Attention and MLP give small whole numbers, whose sums no dtype rounds. What they are given, which is
    normalised, may differ by rounding. A layer that needs more than its input is another one. Raises what the
    other forward raises.
    """
    weight = layer.input_layernorm.weight
    generator = torch.Generator().manual_seed(0)
    x, attended, projected = (
        torch.randint(-4, 5, (1, 4, len(weight)), generator=generator).to(weight) for _ in range(3)
    )
    attention, mlp = layer.self_attn, layer.mlp
    stands_in = _Known((attended, None)), _Known(projected)
    try:
        if not isinstance(mlp(x), Tensor):
            return False  # as of a mixture that tells its router's logits, too
        layer.self_attn, layer.mlp = stands_in
        expected = layer(x)
    except Exception:
        return False
    else:
        found = forward(x)
    finally:
        layer.self_attn, layer.mlp = attention, mlp
    rounding = 4 * torch.finfo(weight.dtype).eps
    pairs = [one.given for one in stands_in]
    return torch.equal(found, expected) and all(
        torch.allclose(before.float(), after.float(), rtol=rounding, atol=1e-6) for before, after in pairs
    )
