"""Owns linear layers with the products of many adapters.

A layer computes the base's product over the whole stream, and each part's LoRA product over that part's own
tokens (qlora.lora.products; on a GPU qlora.lora.kernels). All layers of a model share a switch, which holds
the route of the pass that the model is in: which tokens go through which adapter.

Layers that read the same input (queries, keys and values; the two halves of a gated MLP) are computed
together, by one autograd function, so that the gradients of that input are accumulated in place by matrix
products.

Refuses to know adapters' settings and files.

Shapes: T stream tokens, I (IN) and O (OUT) a layer's widths.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora.base.device import triton_module
from qlora.base.nf4 import dequantise
from qlora.lora import products
from qlora.lora.products import LayerPart

kernels = triton_module("qlora.lora.kernels")


@dataclass(frozen=True)
class Route:
    """The adapters that each token of a pass goes through.

    parts_at: a layer's name -> the parts whose adapter targets the layer. pass_tables, layer_tables: the same
    for the kernels, which use these if they are given. anchor: a scalar that requires a gradient if adapters
    do; they are no inputs of the autograd function themselves.
    """

    anchor: Tensor
    parts_at: Callable[[str], list[LayerPart]]
    pass_tables: Any = None
    layer_tables: Any = None


@dataclass(eq=False)
class Switch:
    """The route of the pass that a model is in, and the layers that read the same input.

    The route is None between passes. The first layer that reads an input is the leader of all that do; they
    are known from the second pass on, so that a bank makes the first one when it makes layers.
    """

    route: Route | None = None
    _siblings: dict[str, list["BankedLinear"]] = field(default_factory=dict)
    _leader: tuple["BankedLinear", Tensor] | None = None
    _ready: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @contextmanager
    def on_route(self, route: Route) -> Iterator[None]:
        """Route the model's layers, within, through the adapters that a route names."""
        assert self.route is None
        self.route = route
        try:
            yield
        finally:
            self.route = None
            self._leader = None
            self._ready.clear()

    def product(self, layer: "BankedLinear", x: Tensor) -> Tensor:
        """Compute a layer's product on the route, x [..., IN] -> [..., OUT].

        With it are computed those of its siblings, the layers that were seen to read the very same x after
        it. Together they need no sum of their inputs' gradients.
        """
        assert self.route is not None
        ready_for, y = self._ready.pop(layer.name, (None, None))
        if y is not None and ready_for is x:
            return y
        if self._leader is not None and self._leader[1] is x:
            siblings = self._siblings[self._leader[0].name]
            if layer not in siblings:
                siblings.append(layer)
        else:
            self._leader = (layer, x)
        together = self._siblings.setdefault(layer.name, [layer])
        if _is_written(x, together, self.route):
            y, *others = _write(x, together, self.route)
        else:
            y, *others = _Banked.apply(x, self.route.anchor, tuple(together), self.route)
        for sibling, product in zip(together[1:], others, strict=True):
            self._ready[sibling.name] = (x, product)
        return y  # type: ignore[no-any-return]


class BankedLinear(nn.Module):
    """A frozen linear layer of the base, in NF4 or not, and the adapters' products on its switch's route."""

    def __init__(self, base: Any, switch: "Switch", name: str, index: int):
        super().__init__()
        self.base = base
        self.name = name
        self.index = index
        self.in_features, self.out_features = base.in_features, base.out_features
        self._switch = switch

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., IN] -> [..., OUT]; between passes by the base alone."""
        if self._switch.route is None:
            return self.base(x)  # type: ignore[no-any-return]
        return self._switch.product(self, x)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the base's weight [OUT, IN], dequantised to `dtype` if it is in NF4."""
        if getattr(self.base.weight, "quant_state", None) is None:
            return self.base.weight  # type: ignore[no-any-return]
        return dequantise(self.base.weight).to(dtype)


def _is_written(x: Tensor, layers: Sequence[BankedLinear], route: Route) -> bool:
    """Tell whether `_write` computes these layers: in kernels, none with a bias, and without gradients."""
    has_gradients = torch.is_grad_enabled() and (x.requires_grad or route.anchor.requires_grad)
    return route.pass_tables is not None and not has_gradients and not _has_bias(layers)


def _write(x: Tensor, layers: Sequence[BankedLinear], route: Route) -> list[Tensor]:
    """Compute what _Banked does, and keep nothing."""
    x_TI = x.reshape(-1, x.shape[-1])
    ys = [x_TI.new_empty(len(x_TI), layer.out_features) for layer in layers]
    kernels.write_lora(x_TI, ys, route.pass_tables, _tables_of(layers, route))
    for layer, y_TO in zip(layers, ys, strict=True):
        y_TO.addmm_(x_TI, layer.weight(x.dtype).t())
    return [y_TO.view(*x.shape[:-1], -1) for y_TO in ys]


def _has_bias(layers: Sequence[BankedLinear]) -> bool:
    return any(layer.base.bias is not None for layer in layers)


def _tables_of(layers: Sequence[BankedLinear], route: Route) -> list[Any]:
    """Return the kernels' tables of these layers."""
    return [route.layer_tables[layer.index] for layer in layers]


class _Banked(torch.autograd.Function):
    """The function y = x W' + bias + LoRA products of one or several layers that read x.

    A and B get their gradients in the backward, beside autograd: as inputs of the function there would be two
    for each layer and adapter.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, layers: tuple[BankedLinear, ...], route: Route
    ) -> tuple[Tensor, ...]:
        ctx.layers = layers
        ctx.route = route
        ctx.set_materialize_grads(False)
        x_TI = x.reshape(-1, x.shape[-1])
        ys = []
        kept = list[Tensor | None]()  # what kernels.add_lora, or products.add_lora, returned
        if route.pass_tables is None:
            for layer in layers:
                ys.append(F.linear(x_TI, layer.weight(x.dtype), layer.base.bias))
                for low_and_mask in products.add_lora(x_TI, ys[-1], route.parts_at(layer.name), layer.index):
                    kept += low_and_mask
        else:
            # LoRA products come first where they can: a matrix product adds to what is there at no cost.
            is_new = not _has_bias(layers)
            for layer in layers:
                if is_new:
                    ys.append(x_TI.new_empty(len(x_TI), layer.out_features))
                else:
                    ys.append(F.linear(x_TI, layer.weight(x.dtype), layer.base.bias))
            kept += kernels.add_lora(x_TI, ys, route.pass_tables, _tables_of(layers, route), is_new=is_new)
            if is_new:
                for layer, y_TO in zip(layers, ys, strict=True):
                    y_TO.addmm_(x_TI, layer.weight(x.dtype).t())
        ctx.save_for_backward(x_TI, *kept)  # all of it, so that what is computed again is not kept besides
        return tuple(y_TO.view(*x.shape[:-1], -1) for y_TO in ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        route: Route = ctx.route
        x_TI, *kept = ctx.saved_tensors
        shape = next(grad.shape[:-1] for grad in grads if grad is not None)
        dys = []
        for layer, grad in zip(ctx.layers, grads, strict=True):
            # Where nobody used a product it has no gradient, which is rare.
            dy = x_TI.new_zeros(len(x_TI), layer.out_features) if grad is None else grad
            dys.append(dy.reshape(-1, dy.shape[-1]).contiguous())
        has_input_grad = ctx.needs_input_grad[0]
        dx_TI = None
        if route.pass_tables is None:
            low_and_mask = iter(zip(kept[::2], kept[1::2], strict=True))
            for layer, dy_TO in zip(ctx.layers, dys, strict=True):
                if has_input_grad:
                    weight = layer.weight(dy_TO.dtype)
                    dx_TI = dy_TO @ weight if dx_TI is None else dx_TI.addmm_(dy_TO, weight)
                parts = route.parts_at(layer.name)
                own = list(itertools.islice(low_and_mask, len(parts)))
                products.lora_backward(x_TI, dy_TO, dx_TI, parts, own)
        else:
            if has_input_grad:
                dx_TI = torch.empty_like(x_TI)
            tables = _tables_of(ctx.layers, route)
            kernels.lora_backward(x_TI, dys, dx_TI, kept, route.pass_tables, tables)
            if dx_TI is not None:
                for layer, dy_TO in zip(ctx.layers, dys, strict=True):
                    dx_TI.addmm_(dy_TO, layer.weight(dy_TO.dtype))
        return (None if dx_TI is None else dx_TI.view(*shape, -1)), None, None, None
