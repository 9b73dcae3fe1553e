"""Owns linear layers with the products of many adapters: the base's product over the whole stream, then each part's LoRA product over
its own tokens (qlora.lora.products; on a GPU qlora.lora.kernels).

All layers of a model share a switch, which says on what route a pass goes. Refuses to know adapters' settings and files.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora.base.device import triton_module
from qlora.lora import products
from qlora.lora.products import LayerPart

kernels = triton_module("qlora.lora.kernels")


@dataclass(frozen=True)
class Route:
    """Which tokens of a pass go through which adapter: the parts that have one at a layer, by its name, or, for the kernels, tables of
    the pass and of each layer. anchor: a scalar that requires a gradient if adapters do, since they are no inputs of autograd's."""

    anchor: Tensor
    parts_at: Callable[[str], list[LayerPart]]
    pass_tables: Any = None
    layer_tables: Any = None


@dataclass(eq=False)
class Switch:
    """The route of the pass that a model is in, none between passes, and which layers read the same input."""

    route: Route | None = None
    _siblings: dict[str, list["BankedLinear"]] = field(default_factory=dict)
    _leader: tuple["BankedLinear", Tensor] | None = None
    _ready: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @contextmanager
    def on_route(self, route: Route) -> Iterator[None]:
        """Within: the model's layers follow a route."""
        assert self.route is None
        self.route = route
        try:
            yield
        finally:
            self.route, self._leader = None, None
            self._ready.clear()

    def product(self, layer: "BankedLinear", x: Tensor) -> Tensor:
        """A layer's product on the route, with those of the layers that were seen to read the very same x after it (queries, keys
        and values; a gated MLP's two halves): together they need no sum of their inputs' gradients."""
        assert self.route is not None
        read, y = self._ready.pop(layer.name, (None, None))
        if y is not None and read is x:
            return y
        if self._leader is not None and self._leader[1] is x:
            siblings = self._siblings[self._leader[0].name]
            if layer not in siblings:
                siblings.append(layer)
        else:
            self._leader = (layer, x)
        together = self._siblings.setdefault(layer.name, [layer])
        y, *others = _Banked.apply(x, self.route.anchor, tuple(together), self.route)
        self._ready.update((other.name, (x, one)) for other, one in zip(together[1:], others, strict=True))
        return y  # type: ignore[no-any-return]


class BankedLinear(nn.Module):
    """A frozen linear layer of the base, in NF4 or not, and the adapters' products that its switch's route asks for."""

    def __init__(self, base: Any, switch: "Switch", name: str, index: int):
        super().__init__()
        self.base, self.name, self.index = base, name, index
        self.in_features, self.out_features = base.in_features, base.out_features
        self._switch = switch

    def forward(self, x: Tensor) -> Tensor:
        """x [..., IN] -> [..., OUT]."""
        return self.base(x) if self._switch.route is None else self._switch.product(self, x)  # type: ignore[no-any-return]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The base's weight [OUT, IN], dequantised if need be."""
        state = getattr(self.base.weight, "quant_state", None)
        if state is None:
            return self.base.weight  # type: ignore[no-any-return]
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.base.weight.data, state).to(dtype)  # type: ignore[no-any-return]


class _Banked(torch.autograd.Function):
    """y = x W' + bias + LoRA products, of one or several layers that read x. A, B get their gradients here, beside autograd: they would
    be as many inputs as adapters."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, layers: tuple[BankedLinear, ...], route: Route
    ) -> tuple[Tensor, ...]:
        ctx.layers, ctx.route, ctx.kept = layers, route, []
        ctx.set_materialize_grads(False)
        x_TI = x.reshape(-1, x.shape[-1])
        outs, lows = [], []
        for layer in layers:
            weight, bias = layer.weight(x.dtype), layer.base.bias
            if route.pass_tables is None:
                y_TO = F.linear(x_TI, weight, bias)
                ctx.kept.append(products.add_lora(x_TI, y_TO, route.parts_at(layer.name), layer.index))
            else:  # LoRA products first: what is there, a matrix product adds to at no cost
                y_TO = (
                    x_TI.new_empty(len(x_TI), layer.out_features)
                    if bias is None
                    else F.linear(x_TI, weight, bias)
                )
                tables = route.layer_tables[layer.index]
                lows.append(
                    kernels.add_lora(x_TI, y_TO, route.pass_tables, tables, layer.index, is_new=bias is None)
                )
                if bias is None:
                    y_TO.addmm_(x_TI, weight.t())
            outs.append(y_TO.view(*x.shape[:-1], -1))
        ctx.save_for_backward(x_TI, *lows)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        route, (x_TI, *lows) = ctx.route, ctx.saved_tensors
        dx_TI, shape = None, next(grad.shape[:-1] for grad in grads if grad is not None)
        for number, (layer, grad) in enumerate(zip(ctx.layers, grads, strict=True)):
            if grad is None:
                continue
            dy_TO = grad.reshape(-1, grad.shape[-1]).contiguous()
            weight = layer.weight(dy_TO.dtype) if ctx.needs_input_grad[0] else None
            if route.pass_tables is None:
                if weight is not None:
                    dx_TI = dy_TO @ weight if dx_TI is None else dx_TI.addmm_(dy_TO, weight)
                products.lora_backward(x_TI, dy_TO, dx_TI, route.parts_at(layer.name), ctx.kept[number])
            else:
                is_new = weight is not None and dx_TI is None
                if is_new:
                    dx_TI = torch.empty_like(x_TI)
                kernels.lora_backward(
                    x_TI,
                    dy_TO,
                    dx_TI,
                    lows[number],
                    route.pass_tables,
                    route.layer_tables[layer.index],
                    layer.index,
                    is_new=is_new,
                )
                if dx_TI is not None:
                    dx_TI.addmm_(dy_TO, weight)
        return (None if dx_TI is None else dx_TI.view(*shape, -1)), None, None, None
