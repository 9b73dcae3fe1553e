"""Owns sibling linear layers: those that read one input, and are multiplied by it together if that is faster.

A product with few rows is over before a GPU is full: queries, keys and values one after another take half as
long again as all three at once. Whoever calls is the model's own code, one layer after another: the first
one's call computes all, and the others give out what it has found. This is for inference only.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NAMES = ("q_proj", "k_proj", "v_proj")
_MOST_ROWS = 512  # with more, each product fills a GPU by itself


def join_siblings(model: nn.Module) -> int:
    """Let the projections of each attention share one weight, and products of few rows; return how many do.

    Projections that are not plain linear layers, as those with an adapter, stay as they are.
    """
    joined = [module for module in model.modules() if _has_siblings(module)]
    for module in joined:  # one by one, so that no more than one's weights are in memory twice
        linears: list[Any] = [getattr(module, name) for name in _NAMES]
        siblings = _Siblings(linears)
        for index, name in enumerate(_NAMES):
            setattr(module, name, SiblingLinear(siblings, index, linears[index]))
    return len(joined)


def _has_siblings(module: nn.Module) -> bool:
    linears: list[Any] = [getattr(module, name, None) for name in _NAMES]
    if not all(type(linear) is nn.Linear for linear in linears):
        return False
    kinds = {(one.in_features, one.weight.dtype, one.weight.device, one.bias is None) for one in linears}
    return len(kinds) == 1


class _Siblings:
    """Holds the joined weight [sum of outs, in] of linear layers, and products to be asked for yet."""

    def __init__(self, linears: Sequence[nn.Linear]):
        self.weight = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.sizes = [linear.out_features for linear in linears]
        self._input: Tensor | None = None
        self._products = dict[int, Tensor]()

    def product(self, x: Tensor, index: int) -> Tensor | None:
        """Return a layer's product with x [..., in]; None where it is better computed by itself."""
        if x is not self._input or index not in self._products:
            self._input, self._products = None, {}
            if index > 0 or x.numel() > _MOST_ROWS * x.shape[-1]:
                return None
            self._input, self._products = x, dict(enumerate(self._together(x)))
        found = self._products.pop(index)
        if not self._products:
            self._input = None
        return found

    def _together(self, x: Tensor) -> Sequence[Tensor]:
        if len(set(self.sizes)) > 1:
            return F.linear(x, self.weight, self.bias).split(self.sizes, -1)
        n, size = len(self.sizes), self.sizes[0]
        weights = self.weight.view(n, size, -1).transpose(1, 2)
        rows = x.reshape(-1, x.shape[-1]).expand(n, -1, -1)
        if self.bias is None:
            found = torch.bmm(rows, weights)
        else:
            found = torch.baddbmm(self.bias.view(n, 1, size), rows, weights)
        return found.view(n, *x.shape[:-1], size).unbind(0)


class SiblingLinear(nn.Module):
    """A linear layer whose weight is a part of its siblings' joined one."""

    def __init__(self, siblings: _Siblings, index: int, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._siblings, self._index = siblings, index
        weight = siblings.weight.split(siblings.sizes)[index]
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = None if siblings.bias is None else siblings.bias.split(siblings.sizes)[index]
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in] -> [..., out]."""
        found = self._siblings.product(x, self._index)
        return F.linear(x, self.weight, self.bias) if found is None else found
