"""Owns layers that are computed again: a decoder layer keeps its input, its backward begins with a forward.

What a pass keeps of a token is then one number for each of its channels a layer, where it would be some
dozens. A training pass has one forward more, and is launched, not recorded; kernels get what they would get.

Source: gradient checkpointing, https://arxiv.org/abs/1604.06174.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.base.residuals import one_by_one
from qlora.packed.handed_down import keywords_again


def recompute_layers(model: nn.Module) -> bool:
    """Have a model's decoder layers computed again in each backward; tell whether it has such layers.

    transformers' own switch would also draw the dropout of layers that have some.
    """
    layers: list[Any] = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = partial(_forward, layer.forward, one_by_one(layer.forward))
    return bool(layers)


def can_recompute(model: nn.Module) -> bool:
    """Tell whether a model has layers that can be computed again."""
    return any(isinstance(one, GradientCheckpointingLayer) for one in model.modules())


def _forward(forward: Callable[..., Any], alone: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Run a layer's forward; with gradients the one that leaves nothing to other layers, and again later."""
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    work = partial(alone, **named)
    return checkpoint(work, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what a layer's forward runs in, and what it runs in again."""
    return nullcontext(), keywords_again()
