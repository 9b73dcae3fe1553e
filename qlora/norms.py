"""Owns fused normalisation on GPUs: RMSNorm modules in transformers' five small kernels become one of torch's.

A module is replaced, as PEFT and bitsandbytes replace linear layers, only if the replacement computes the same on a random
input; a family whose norm differs (Gemma scales by 1 + weight) keeps its own.
"""

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


def fuse_norms(model: nn.Module) -> int:
    """Replace a model's RMSNorm modules where that changes nothing beyond rounding; returns how many were."""
    fused = {name: replacement for name, module in model.named_modules() if (replacement := _replacement(module)) is not None}
    for name, replacement in fused.items():
        model.set_submodule(name, replacement)
    return len(fused)


def _replacement(module: nn.Module) -> FusedRMSNorm | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter) or weight.dim() != 1 or eps is None:
        return None
    fused = FusedRMSNorm(weight, eps)
    with torch.no_grad():
        x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
        same = torch.allclose(fused(x).float(), module(x).float(), rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-6)
    return fused if same else None
