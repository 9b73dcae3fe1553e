"""Owns what is fused on GPUs: chains of small kernels in transformers' models become one kernel each.

RMSNorm modules become torch's own, replaced as PEFT and bitsandbytes replace linear layers, only if the replacement computes
the same on a random input; a family whose norm differs (Gemma scales by 1 + weight) keeps its own. For training, the rotary
embedding and the gated MLP are Liger's (https://github.com/linkedin/Liger-Kernel), where that package is installed.
"""

import importlib.util
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 inside. Source: https://arxiv.org/abs/1910.07467."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] -> [..., n], in x's dtype; autocast would go through float32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


_log = logging.getLogger(__name__)


def fuse_for_training(model: Any) -> None:
    """Norms, and Liger's rotary embedding and gated MLP for the families that Liger knows.

    Liger puts its rotary embedding into the family's module in transformers: all models of the family in this process get it.
    """
    fuse_norms(model)
    if importlib.util.find_spec("liger_kernel") is None:
        _log.info("liger-kernel is not installed: rotary embedding and MLP stay in several kernels")
        return
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


def _turns_whole_heads(config: Any) -> bool:
    """Whether the rotary embedding turns all of a head: Liger's does not know another."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    return (
        getattr(text, "partial_rotary_factor", None) or parameters.get("partial_rotary_factor") or 1.0
    ) == 1.0


def fuse_norms(model: nn.Module) -> int:
    """Replace a model's RMSNorm modules where that changes nothing beyond rounding; returns how many were."""
    fused = {
        name: replacement
        for name, module in model.named_modules()
        if (replacement := _replacement(module)) is not None
    }
    for name, replacement in fused.items():
        model.set_submodule(name, replacement)
    return len(fused)


def _replacement(module: nn.Module) -> FusedRMSNorm | None:
    weight, eps = (
        getattr(module, "weight", None),
        getattr(module, "variance_epsilon", getattr(module, "eps", None)),
    )
    if (
        not type(module).__name__.endswith("RMSNorm")
        or not isinstance(weight, nn.Parameter)
        or weight.dim() != 1
        or eps is None
    ):
        return None
    fused = FusedRMSNorm(weight, eps)
    with torch.no_grad():
        x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
        same = torch.allclose(
            fused(x).float(), module(x).float(), rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-6
        )
    return fused if same else None
