"""Owns fused norms: RMSNorm modules of transformers' models give way to one that calls torch's own kernel.

PEFT and bitsandbytes replace linear layers in that way. It is done only if the replacement computes the same
on a random input: a family whose norm differs (Gemma scales by 1 + weight) keeps its own.

Refuses to know other modules.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedRMSNorm(nn.Module):
    """Root mean square normalisation: x / sqrt(mean(x^2) + eps) * weight, in float32 inside.

    Source: https://arxiv.org/abs/1910.07467.
    """

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight = weight
        self.eps = eps
        self._expected: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., n] -> [..., n], in x's dtype."""
        expected, self._expected = self._expected, None
        if expected is not None and expected[0] is x:
            return expected[1]
        # Autocast would convert x to float32 and give float32 back.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def expect(self, x: Tensor, normed: Tensor) -> None:
        """Keep what the next call would compute, if it is for the very tensor x."""
        self._expected = (x, normed)

    def forget(self) -> None:
        """Drop what `expect` has kept."""
        self._expected = None


def fuse_norms(model: nn.Module) -> int:
    """Replace a model's RMSNorm modules where that changes nothing beyond rounding; return how many were."""
    fused = {}
    for name, module in model.named_modules():
        replacement = _replacement(module)
        if replacement is not None:
            fused[name] = replacement
    for name, replacement in fused.items():
        model.set_submodule(name, replacement)
    return len(fused)


def _replacement(module: nn.Module) -> FusedRMSNorm | None:
    """Return the fused norm for a module, or None if it is no RMSNorm or one that computes something else."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or eps is None:
        return None
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return None
    fused = FusedRMSNorm(weight, eps)
    rounding = 4 * torch.finfo(weight.dtype).eps
    with torch.no_grad():
        x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
        is_same = torch.allclose(fused(x).float(), module(x).float(), rtol=rounding, atol=1e-6)
    return fused if is_same else None
