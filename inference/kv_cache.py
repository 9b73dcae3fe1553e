"""Owns the KV cache of running searches: keys and values of all earlier tokens, in stores that no step moves.

A KV cache keeps the keys and values of earlier tokens, so that a decode step computes only the new ones. Beam
search usually copies cache rows whenever beams branch. Here there are three stores for each layer instead:
the prefix's (once for all examples), the prompts' (once for each example, read by all of its beams), and what
beams were fed, in the row of the beam that was fed it. A beam reaches its history through its ancestry, as
inference.cached_attention describes.

Refuses to know how tokens are chosen, and how attention is computed.

Shapes: E slots, K beams, J key-value heads, D head width, P prefix tokens, L the longest prompt's own tokens,
T tokens that a beam is fed at most.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora.base.model import attention_shape


@dataclass(frozen=True)
class CacheShape:
    """The shape of a model's cache: its layers, key-value heads and head width, and its dtype."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PreTrainedModel) -> "CacheShape":
        """Return the shape that a model's config describes."""
        shape = attention_shape(model.config)
        return cls(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=model.dtype,
        )

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass
class KVCache:
    """The stores, each one tensor for all layers.

    prefix: [2, layers, J, P, D]. prompts: [2, layers, E, J, L, D]. fed: [2, layers, E, J, T, K, D]. Index 0
    of the first axis has keys, index 1 values. own_E: a slot's prompt tokens behind the prefix.
    """

    prefix: Tensor
    prompts: Tensor
    fed: Tensor
    own_E: Tensor

    @classmethod
    def empty(
        cls, shape: CacheShape, prefix: Tensor, num_slots: int, num_beams: int, max_own: int, max_steps: int
    ) -> "KVCache":
        """Make stores with room for `num_slots` examples of `max_own` prompt tokens and `max_steps` steps."""
        sizes = (2, shape.num_layers, num_slots, shape.num_kv_heads)
        options: dict[str, Any] = {"dtype": shape.dtype, "device": prefix.device}
        return cls(
            prefix=prefix,
            prompts=torch.zeros(*sizes, max_own, shape.head_dim, **options),
            fed=torch.zeros(*sizes, max_steps, num_beams, shape.head_dim, **options),
            own_E=torch.zeros(num_slots, dtype=torch.int64, device=prefix.device),
        )

    @property
    def room(self) -> tuple[int, int]:
        """Return the number of slots E, and of prompt tokens L that each has room for."""
        return self.prompts.shape[2], self.prompts.shape[4]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all slots, without the prefix."""
        return self.prompts.nbytes + self.fed.nbytes

    def keep(self, slots: Tensor) -> "KVCache":
        """Return a cache of some of the slots, in that order."""
        return KVCache(
            prefix=self.prefix,
            prompts=self.prompts.index_select(2, slots),
            fed=self.fed.index_select(2, slots),
            own_E=self.own_E.index_select(0, slots),
        )
