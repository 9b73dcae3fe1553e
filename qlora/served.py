"""Owns the model that is served and evaluated: base and adapter as one, merged into dequantised weights when memory allows.

The dequantised weights are the NF4 values, so that what was tuned is what is served; a step then costs no dequantising.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from qlora.base.fused import fuse_norms
from qlora.base.model import free_bytes, load_base
from qlora.config import BaseModelSettings
from qlora.lora.peft_folder import load_adapter

_log = logging.getLogger(__name__)


def load_served(base: BaseModelSettings, adapter: str | None = None) -> Any:
    """The base with the adapter of a PEFT folder, if any, in eval mode on this process's device, quickened.

    Raises InputError if either can't be had or they don't fit each other.
    """
    model = load_merged(base, adapter)
    quicken(model)
    return model


def load_merged(base: BaseModelSettings, adapter: str | None = None) -> Any:
    """As `load_served`, in transformers' own modules; with the adapter apart on the NF4 base if memory is short."""
    model: Any = load_base(base)
    if base.quantization == "nf4":
        model = dequantised_if_it_fits(model)
        if _is_nf4(model):
            return load_adapter(model, adapter).eval() if adapter else model
    if adapter is not None:
        model = load_adapter(model, adapter).merge_and_unload()  # type: ignore[operator]
    return model.requires_grad_(False).eval()


def dequantised_if_it_fits(model: Any) -> Any:
    """A model with its NF4 values in its own dtype, if that takes less than half of the free memory; else the model as it is."""
    if not _is_nf4(model):
        return model
    needed, free = _dequantised_bytes(model), free_bytes(model.device)
    fits = 2 * needed < free
    _log.info(
        "%s: dequantised weights need %.1f GiB of %.1f free",
        "dequantised" if fits else "kept in NF4",
        needed / 2**30,
        free / 2**30,
    )
    return model.dequantize().requires_grad_(False).eval() if fits else model


def describe_weights(model: nn.Module) -> str:
    """What is served, in words: merged weights, or an NF4 base with its adapter apart."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return "NF4 weights, adapter apart" if _is_nf4(model) else f"merged {dtype} weights"


def quicken(model: nn.Module) -> None:
    """Replace modules by ones that compute the same faster, for inference only: norms on a GPU, linear layers on a CPU."""
    if next(model.parameters()).is_cuda:
        fuse_norms(model)
    elif torch.backends.mkldnn.is_available():
        names = [
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear and module.weight.dtype == torch.float32
        ]
        for name in names:  # one by one, so that no more than one weight stands twice
            model.set_submodule(name, PackedLinear(model.get_submodule(name)))


class PackedLinear(nn.Module):
    """A linear layer in float32 whose weight stands in oneDNN's blocked layout, which need not be made anew for every product.

    On CPUs without AVX512 a product with few rows takes about two thirds of the time, the head's half of it.
    """

    def __init__(self, linear: Any):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def _is_nf4(model: Any) -> bool:
    from bitsandbytes.nn import Linear4bit

    return any(isinstance(module, Linear4bit) for module in model.modules())


def _dequantised_bytes(model: Any) -> int:
    from bitsandbytes.nn import Linear4bit

    sizes = [
        module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, Linear4bit)
    ]
    return sum(sizes) * model.dtype.itemsize
