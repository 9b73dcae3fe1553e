"""Owns merged weights: W + scale * B A for every layer, one after the other, in float32.

W has the values that the adapter was tuned on: those of NF4, dequantised, if the base is in NF4. No more than
one layer is in memory beside the base, so what a GPU can train it can merge.

Refuses to know files.

Source: LoRA, https://arxiv.org/abs/2106.09685, section 4.1.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.base.model import load_base
from qlora.config import BaseModelSettings
from qlora.lora.peft_folder import load_adapter


def merged_tensors(base: BaseModelSettings, adapter: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name and float32 value, on the CPU, of all that a base's state has, with the adapter merged.

    A tensor of two names (tied embeddings) comes once. Raises InputError if base or adapter can't be loaded,
    or if they don't fit each other.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted: Any = load_adapter(load_base(base), adapter)
    model = adapted.get_base_model()
    layers: list[str] = []
    seen: set[int] = set()
    with torch.no_grad():
        for name, module in model.named_modules():
            if layers and name.startswith(f"{layers[-1]}."):
                continue  # what a layer with an adapter is made of
            inner, delta = module, None
            if isinstance(module, BaseTunerLayer):
                layers.append(name)
                inner = module.get_base_layer()
                delta = module.get_delta_weight(module.active_adapters[0])
            for own, tensor in _own_tensors(inner):
                if id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                value = _plain(inner, own, tensor)
                if delta is not None and own == "weight":
                    value = value + delta.float()
                yield f"{name}.{own}" if name else own, value.cpu()


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a module itself, and the buffers that its state has."""
    for name, parameter in module.named_parameters(recurse=False):
        yield name, parameter
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _plain(module: Any, name: str, tensor: Any) -> Tensor:
    """Return a tensor's values in float32, dequantised if need be."""
    if name == "weight" and getattr(tensor, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        shape = (module.out_features, module.in_features)
        tensor = dequantize_4bit(tensor.data, tensor.quant_state).reshape(shape)
    return tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
