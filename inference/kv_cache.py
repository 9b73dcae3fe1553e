"""Owns keys and values of running searches, and the attention that reads them without ever moving them.

Three stores a layer: the template's (once an engine), a prompt's (once an example, read by all of its beams), and what
beams were fed, in the row that was fed it. A beam reaches its history through its ancestry: rows of all beams of an example are
scored, and those that are not its own ancestors are masked. So no step copies a cache.

The model's own code stays as it is: it calls `cached_attention` through transformers' AttentionInterface and hands down the
pass as the keyword `cached`. Exact for full and sliding-window attention, grouped queries and soft-capped scores.

Shapes: E slots, K beams, H heads, J key-value heads, G = H / J, D head width, P prefix, L longest own prompt part, T steps,
S suffix tokens, W = P + L + T * K, all columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from inference.beam_search import SearchState
from qlora.base.device import triton_module
from qlora.base.model import attention_shape
from qlora.packed.attention import REFUSED_KEYWORDS, attend_rows, refuse_inexact
from qlora.packed.stream import Rows

_kernel = triton_module("inference.decode_kernel")


@dataclass(frozen=True)
class CacheShape:
    """Layers, key-value heads and head width of a model, and its dtype: what one cached token costs."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PreTrainedModel) -> "CacheShape":
        """Read from the config."""
        shape = attention_shape(model.config)
        return cls(shape.num_layers, shape.num_kv_heads, shape.head_dim, model.dtype)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass
class KVCache:
    """The stores, one tensor for all layers: prefix [2, layers, J, P, D], prompts [2, layers, E, J, L, D], and what was fed
    [2, layers, E, J, T, K, D]; index 0 of the first axis has keys, 1 values. own_E: prompt tokens of a slot behind the prefix."""

    prefix: Tensor
    prompts: Tensor
    fed: Tensor
    own_E: Tensor

    @classmethod
    def empty(
        cls, shape: CacheShape, prefix: Tensor, num_slots: int, num_beams: int, max_own: int, max_steps: int
    ) -> "KVCache":
        """Room for `num_slots` examples."""
        head = (2, shape.num_layers, num_slots, shape.num_kv_heads)
        options: dict[str, Any] = {"dtype": shape.dtype, "device": prefix.device}
        return cls(
            prefix,
            torch.zeros(*head, max_own, shape.head_dim, **options),
            torch.zeros(*head, max_steps, num_beams, shape.head_dim, **options),
            torch.zeros(num_slots, dtype=torch.int64, device=prefix.device),
        )

    @property
    def num_bytes(self) -> int:
        """Memory of all slots, without the template's."""
        return self.prompts.nbytes + self.fed.nbytes

    def keep(self, slots: Tensor) -> "KVCache":
        """Some slots alone, in that order."""
        return KVCache(
            self.prefix,
            self.prompts.index_select(2, slots),
            self.fed.index_select(2, slots),
            self.own_E.index_select(0, slots),
        )


class CachedPass(Protocol):
    """What a forward pass does with a layer's queries, keys and values."""

    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        k_TJD: Tensor,
        v_TJD: Tensor,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attention [T, H, D]."""


@dataclass
class PrefillPass:
    """Prompts, packed: each suffix behind the prefix. `store(layer, k_TJD, v_TJD)` keeps what was computed."""

    prefix: Tensor
    rows: Rows
    store: Callable[[int, Tensor, Tensor], None]

    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        k_TJD: Tensor,
        v_TJD: Tensor,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """See CachedPass."""
        self.store(layer, k_TJD, v_TJD)
        k_PJD, v_PJD = self.prefix[:, layer].transpose(1, 2)
        return attend_rows(q_THD, k_TJD, v_TJD, k_PJD, v_PJD, self.rows, scale, sliding_window, softcap)


def store_prompts(cache: KVCache, slots: Tensor, rows: Rows) -> Callable[[int, Tensor, Tensor], None]:
    """Keeps a packed pass's keys and values as the prompts of `slots`, in order."""
    lengths = torch.tensor(rows.lengths, device=slots.device)
    slots_T = slots.repeat_interleave(lengths, output_size=rows.num_tokens)
    columns_T = torch.arange(rows.num_tokens, device=slots.device) - rows.bounds[
        :-1
    ].long().repeat_interleave(lengths, output_size=rows.num_tokens)

    def store(layer: int, k_TJD: Tensor, v_TJD: Tensor) -> None:
        for index, tensor_TJD in enumerate((k_TJD, v_TJD)):
            cache.prompts[index, layer].transpose(1, 2)[slots_T, columns_T] = tensor_TJD

    return store


@dataclass
class DecodePass:
    """One token of every beam of every slot: T = E * K tokens, beams of a slot together.

    `num_steps` bounds the steps that any slot has fed, this one included, so that no more columns are read.
    """

    cache: KVCache
    state: SearchState
    num_steps: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        k_TJD: Tensor,
        v_TJD: Tensor,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """See CachedPass. Scores in the model's dtype, softmax in float32."""
        if _kernel is not None and _kernel.supports(q_THD):
            cache, state = self.cache, self.state
            return _kernel.decode_attention(
                q_THD,
                k_TJD,
                v_TJD,
                cache.prefix[:, layer],
                cache.prompts[:, layer],
                cache.fed[:, layer],
                cache.own_E,
                state.steps_E,
                state.ancestry_EKT,
                scale,
                sliding_window,
                softcap,
            )
        e, k = self.state.next_EK.shape
        j, d = k_TJD.shape[1:]
        g = q_THD.shape[1] // j
        slots = torch.arange(e, device=q_THD.device)
        steps_E = self.state.steps_E.clamp(max=self.cache.fed.shape[4] - 1)
        for index, tensor_TJD in enumerate((k_TJD, v_TJD)):
            _write(self.cache.fed[index, layer], slots, steps_E, tensor_TJD.view(e, k, j, d))
        (k_JPD, v_JPD), (k_EJLD, v_EJLD) = self.cache.prefix[:, layer], self.cache.prompts[:, layer]
        k_EJFD, v_EJFD = self.cache.fed[:, layer, :, :, : self.num_steps].flatten(3, 4)
        q_EJQD = (q_THD * scale).view(e, k, j, g, d).permute(0, 2, 1, 3, 4).reshape(e, j, k * g, d)
        q_JXD = q_EJQD.transpose(0, 1).reshape(j, e * k * g, d)
        prefix_EJQP = (q_JXD @ k_JPD.transpose(1, 2)).view(j, e, k * g, -1).transpose(0, 1)
        scores_EJQW = torch.cat(
            [prefix_EJQP, q_EJQD @ k_EJLD.transpose(2, 3), q_EJQD @ k_EJFD.transpose(2, 3)], dim=-1
        )
        if softcap is not None:
            scores_EJQW = torch.tanh(scores_EJQW / softcap) * softcap
        scores_EJKGW = scores_EJQW.view(e, j, k, g, -1).masked_fill(
            ~self._mask(sliding_window)[:, None, :, None], -torch.inf
        )
        weights_EJQW = scores_EJKGW.softmax(-1, dtype=torch.float32).to(q_THD.dtype).view(e, j, k * g, -1)
        p, n = k_JPD.shape[1], k_EJLD.shape[2]
        w_JXP = weights_EJQW[..., :p].transpose(0, 1).reshape(j, e * k * g, p)
        out_EJQD = (w_JXP @ v_JPD).view(j, e, k * g, d).transpose(0, 1)
        out_EJQD = out_EJQD + weights_EJQW[..., p : p + n] @ v_EJLD + weights_EJQW[..., p + n :] @ v_EJFD
        return out_EJQD.view(e, j, k, g, d).permute(0, 2, 1, 3, 4).reshape(e * k, j * g, d)

    def positions(self) -> Tensor:
        """Position of every fed token, [E, K]."""
        return (self.cache.prefix.shape[3] + self.cache.own_E + self.state.steps_E)[:, None].expand_as(
            self.state.next_EK
        )

    def _mask(self, sliding_window: int | None) -> Tensor:
        """[E, K, W] bool: the prefix, the slot's prompt, and of what was fed the beam's ancestors and itself."""
        if sliding_window not in self._masks:
            p, length, k = (
                self.cache.prefix.shape[3],
                self.cache.prompts.shape[4],
                self.state.next_EK.shape[1],
            )
            own_E, steps_E, device = self.cache.own_E, self.state.steps_E, self.state.steps_E.device
            column_L, column_T = (
                torch.arange(length, device=device),
                torch.arange(self.num_steps, device=device),
            )
            is_ancestor_EKTK = self.state.ancestry_EKT[:, :, : self.num_steps, None] == torch.arange(
                k, device=device
            )
            seen_EKTK = is_ancestor_EKTK & (column_T <= steps_E[:, None])[:, None, :, None]
            parts = [
                torch.ones(p, dtype=torch.bool, device=device).expand(len(own_E), k, p),
                (column_L < own_E[:, None])[:, None].expand(-1, k, -1),
                seen_EKTK.flatten(2),
            ]
            mask_EKW = torch.cat(parts, dim=-1)
            if sliding_window is not None:
                places = [
                    torch.arange(p, device=device).expand(len(own_E), p),
                    p + column_L.expand(len(own_E), length),
                    (p + own_E[:, None] + column_T).repeat_interleave(k, dim=1),
                ]
                distance_EW = (p + own_E + steps_E)[:, None] - torch.cat(places, dim=-1)
                mask_EKW = mask_EKW & (distance_EW < sliding_window)[:, None]
            self._masks[sliding_window] = mask_EKW
        return self._masks[sliding_window]


def use_cached_attention(model: PreTrainedModel) -> None:
    """Make `model(input_ids, position_ids, cached=CachedPass)` attend through the pass. Raises ValueError for a family whose
    results would not be exact."""
    if model.config._attn_implementation == "cached":
        return
    refuse_inexact(model)
    AttentionInterface.register("cached", cached_attention)
    AttentionMaskInterface.register("cached", lambda *_, **__: None)
    model.set_attn_implementation("cached")


def cached_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cached: CachedPass | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, J, T, D] -> ([1, T, H, D], None)."""
    if (
        cached is None
        or attention_mask is not None
        or any(others.get(name) is not None for name in REFUSED_KEYWORDS)
    ):
        raise ValueError(
            f"{type(module).__name__} can't be served from this cache; use transformers' generate"
        )
    q_THD, k_TJD, v_TJD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cached.attend(module.layer_idx, q_THD, k_TJD, v_TJD, scale, sliding_window, softcap)[None], None  # type: ignore[arg-type]


def _write(fed_EJTKD: Tensor, slots_E: Tensor, steps_E: Tensor, new_EKJD: Tensor) -> None:
    """Put every slot's new rows at its own step."""
    fed_EJTKD.transpose(1, 2)[slots_E, steps_E] = new_EKJD.transpose(1, 2)
