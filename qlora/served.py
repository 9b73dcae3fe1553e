"""Owns the model that is served and evaluated: base and adapter as one.

LoRA's product can be merged into the weight it belongs to, W + scale * B A, so that an adapter costs nothing
in inference. If memory allows, that is done on dequantised weights. They are the NF4 values, so that an
adapter is served on what it was tuned on, and no step has to dequantise them.

Refuses to know generation.

Source: LoRA, https://arxiv.org/abs/2106.09685, section 4.1.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from qlora.base.fused import fuse, has_liger
from qlora.base.loading import load_bitsandbytes
from qlora.base.model import dequantised_if_it_fits, is_nf4, load_base
from qlora.base.nf4 import quicken_layers
from qlora.base.siblings import join_siblings
from qlora.config import BaseModelSettings
from qlora.lora.peft_folder import load_adapter


def load_libraries() -> None:
    """Import what `load_served` would import on first use."""
    load_bitsandbytes()
    importlib.import_module("peft")
    if torch.cuda.is_available() and has_liger():
        importlib.import_module("liger_kernel.transformers")


def load_served(base: BaseModelSettings, adapter: str | None = None) -> Any:
    """Load the base with the adapter of a PEFT folder, if any, and replace modules by faster ones.

    The model is in eval mode, on this process's device. Raises InputError if base or adapter can't be loaded,
    or if they don't fit each other.
    """
    model = load_merged(base, adapter)
    quicken(model)
    return model


def load_merged(base: BaseModelSettings, adapter: str | None = None) -> Any:
    """Load as `load_served` does, but with transformers' own modules.

    If memory is short, the base stays in NF4 and the adapter apart.
    """
    model: Any = dequantised_if_it_fits(load_base(base))
    if adapter is None:
        return model
    adapted: Any = load_adapter(model, adapter)
    if not is_nf4(model):
        adapted = adapted.merge_and_unload()
    return adapted.requires_grad_(False).eval()


def describe_weights(model: nn.Module) -> str:
    """Describe in words what is served: merged weights, or an NF4 base with its adapter apart."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return "NF4 weights, adapter apart" if is_nf4(model) else f"merged {dtype} weights"


def quicken(model: nn.Module) -> None:
    """Replace modules by faster ones with the same results: `fuse` on a GPU, and linear layers.

    This is for inference only: the linear layers have no backward.
    """
    if next(model.parameters()).is_cuda:
        fuse(model)
        join_siblings(model)
        if is_nf4(model):
            quicken_layers(model)
    elif torch.backends.mkldnn.is_available():
        names = [
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear and module.weight.dtype == torch.float32
        ]
        for name in names:  # one by one, so that no more than one weight is in memory twice
            model.set_submodule(name, PackedLinear(model.get_submodule(name)))


class PackedLinear(nn.Module):
    """A linear layer in float32 whose weight is kept in oneDNN's blocked layout.

    So no product has to bring it into that layout again. On CPUs without AVX512 a product with few rows takes
    about two thirds of the time, and the head's product half of it.
    """

    def __init__(self, linear: Any):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in] -> [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
