"""Owns what is fused on GPUs: chains of small kernels in transformers' models become one kernel each.

A small kernel spends more time on moving its operands to and from memory than on arithmetic; fusing a chain
of them moves the operands once. Norms are torch's own kernel (qlora.base.norms); sums with the residual that
are normalised are this project's (qlora.base.residuals); the rotary embedding and the gated MLP are Liger's,
where that package is installed.

Refuses to know adapters.

Source: Liger Kernel, https://github.com/linkedin/Liger-Kernel
"""

import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora.base.device import triton_module
from qlora.base.norms import fuse_norms
from qlora.base.residuals import fuse_residuals

residual_kernel = triton_module("qlora.base.residual_kernel")
_log = logging.getLogger(__name__)
_ROTARY = "apply_rotary_pos_emb"
_own_rotary: dict[str, Callable[..., Any] | None] = {}  # of families, by transformers' modules


def fuse(model: Any) -> None:
    """Replace norms and sums with the residual, and the rotary embedding and gated MLP that Liger knows.

    The model may have adapters of PEFT's. What fails or computes something else on a random input is left as
    it was.
    """
    fuse_norms(model)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if has_liger():
        _fuse_by_liger(plain)
    else:
        _log.info("liger-kernel is not installed: rotary embedding and MLP stay in several kernels")
    if residual_kernel is not None:
        fuse_residuals(plain, residual_kernel.add_and_normalise, in_training=True)


def _fuse_by_liger(model: Any) -> None:
    """Replace the rotary embedding and gated MLP.

    Liger puts its rotary embedding into the family's module in transformers, so all models of the family in
    this process get it; those on a CPU keep their own. Whatever else it puts there is taken out again.
    """
    module: Any = sys.modules[type(model).__module__]
    before = dict(vars(module))
    rotary = before.get(_ROTARY)
    own = _own_rotary.setdefault(module.__name__, rotary)
    mlps = [one for one in model.modules() if type(one).__name__.endswith("MLP")]
    try:
        expected = _sample(model, own, mlps)
        _apply_liger(model)
        put = getattr(module, _ROTARY, None)
        fused = own if put is rotary else put
        if not _is_near(_sample(model, fused, mlps), expected):
            raise ValueError("it computes something else")
        if own is not None and fused is not None and fused is not own:
            before[_ROTARY] = _on_gpus(fused, own)
    except Exception as error:  # whatever a version of Liger makes of a family that it does not fit
        _log.warning("liger-kernel is left out: %s", error)
        for mlp in mlps:
            mlp.__dict__.pop("forward", None)
    finally:
        vars(module).update(before)


def _apply_liger(model: Any) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(
        model,
        rope=_turns_whole_heads(model.config),
        swiglu=True,
        geglu=True,
        rms_norm=False,
        layer_norm=False,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
    )


@torch.no_grad()
def _sample(model: Any, rotary: Callable[..., Any] | None, mlps: Sequence[nn.Module]) -> list[Tensor]:
    """Return what a rotary embedding and the first MLP make of random inputs."""
    config, generator = model.config.get_text_config(), torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(model.device, model.dtype)

    found = [mlps[0](randn(1, 4, config.hidden_size))] if mlps else []
    if rotary is not None and _turns_whole_heads(config):
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        angles = randn(1, 4, width // 2).repeat(1, 1, 2)
        found += rotary(randn(1, 4, 4, width), randn(1, 2, 4, width), angles.cos(), angles.sin())
    return found


def _is_near(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Tell whether tensors are equal but for rounding."""
    share = max(1e-4, 8 * max(torch.finfo(one.dtype).eps for one in expected)) if expected else 0
    pairs = [(one.double(), other.double()) for one, other in zip(found, expected, strict=True)]
    return all((one - other).norm() <= share * other.norm() for one, other in pairs)


def _on_gpus(fused: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """Make a rotary embedding that is the fused one for queries on a GPU, else the family's own."""

    def turn(q: Tensor, *others: Any, **options: Any) -> Any:
        return (fused if q.is_cuda else own)(q, *others, **options)

    return turn


def has_liger() -> bool:
    """Tell whether Liger's kernels are installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def _turns_whole_heads(config: Any) -> bool:
    """Tell whether the rotary embedding turns all channels of a head: Liger knows only that kind."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    turned = getattr(text, "partial_rotary_factor", None) or parameters.get("partial_rotary_factor") or 1.0
    return turned == 1.0
