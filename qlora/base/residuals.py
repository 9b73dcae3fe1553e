"""Owns sums that are normalised right away: a layer adds to the residual and normalises the sum at once.

In a decoder layer that normalises what attention and MLP read, each sum with the residual is written to
memory only to be read by the norm behind it. One kernel does both. Behind the MLP that norm is the next
layer's, which finds there what it would compute. A family whose layers differ keeps them as they are, and so
do layers that are computed again in the backward, since each of those is computed by itself.

Refuses to know attention, MLPs and the kernel.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora.base.norms import FusedRMSNorm

_log = logging.getLogger(__name__)
_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
# Adds x and residual [..., n]; returns their norm by a weight [n] and an epsilon, and the sum. Where layers
# train, it is differentiable in both.
AddAndNormalise = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def fuse_residuals(model: Any, add_and_normalise: AddAndNormalise, *, in_training: bool = False) -> int:
    """Let decoder layers with fused norms add and normalise at once; return how many do.

    `in_training`: also with gradients, where the kernel has them and the weights of norms are frozen. A layer
    is left as it is where that changes more than rounding, and all are where the kernel fails.
    """
    layers = [one for one in model.modules() if _has_the_parts(one)]
    behind = [*(layer.input_layernorm for layer in layers), _last_norm(model)][1:]
    fused = dict[Any, Callable[..., Tensor]]()
    if in_training and layers:
        in_training = _has_the_gradient(layers[0].input_layernorm, add_and_normalise)
    for layer, norm in zip(layers, behind, strict=True):
        forward = partial(_forward, layer, layer.forward, (add_and_normalise, in_training), norm)
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


def one_by_one(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward that a layer had before its sums were fused, given the one that it has."""
    is_fused = isinstance(forward, partial) and forward.func is _forward
    return forward.args[1] if is_fused else forward  # type: ignore[attr-defined, no-any-return]


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
    kernel: tuple[AddAndNormalise, bool],
    next_norm: FusedRMSNorm | None,
    hidden_states: Tensor,
    *others: Any,
    **named: Any,
) -> Tensor:
    """Compute what a layer's own forward does, x + attend(norm(x)), then y + mlp(norm(y)).

    kernel: what adds and normalises, and whether it does so with gradients, too.
    """
    add_and_normalise, in_training = kernel
    if others or (torch.is_grad_enabled() and not (in_training and _is_frozen(layer, next_norm))):
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


def _is_frozen(layer: Any, next_norm: FusedRMSNorm | None) -> bool:
    """Tell that norms behind a layer's sums are not trained, and that it does not compute itself again."""
    norms = (layer.post_attention_layernorm, next_norm)
    return not layer.training and not any(norm is not None and norm.weight.requires_grad for norm in norms)


def _add(
    x: Tensor, residual: Tensor, norm: FusedRMSNorm, add_and_normalise: AddAndNormalise
) -> tuple[Tensor, Tensor]:
    """Return the norm of a sum, and the sum; by two kernels where dtypes differ, as under autocast."""
    if x.dtype == residual.dtype == norm.weight.dtype:
        return add_and_normalise(x, residual, norm.weight, norm.eps)
    total = residual + x
    return norm(total), total


@torch.enable_grad()
def _has_the_gradient(norm: FusedRMSNorm, add_and_normalise: AddAndNormalise) -> bool:
    """Tell whether a kernel has the values and gradients of a sum and its norm, on a random input."""
    weight, found = norm.weight.detach(), list[list[Tensor]]()
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, len(weight))
    x, residual, *factors = (torch.randn(shape, generator=generator).to(weight) for _ in range(4))

    def plain(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return F.rms_norm(residual + x, weight.shape, weight, eps), residual + x

    try:
        for kernel in (plain, add_and_normalise):
            first, second = (one.clone().requires_grad_() for one in (x, residual))
            outputs = kernel(first, second, weight, norm.eps)
            gradients = torch.autograd.grad(outputs, (first, second), factors)
            found.append([*outputs, *gradients])
    except Exception as error:  # whatever a version of the kernel makes of a device that it does not fit
        _log.warning("sums with the residual and norms stay in two kernels in training: %s", error)
        return False
    rounding = 8 * torch.finfo(weight.dtype).eps
    pairs = zip(*found, strict=True)
    return all(bool((one - two).float().norm() <= rounding * one.float().norm()) for one, two in pairs)


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
