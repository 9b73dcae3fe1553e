"""Owns the attention of running searches, which reads the KV cache (inference.kv_cache) where it is.

There are two kinds of pass. A prefill computes the keys and values of prompts, packed and behind the shared
prefix. A decode step feeds one token of every beam. A beam reaches its history through its ancestry, which
says which row was fed each of its tokens: the rows of all beams of an example are scored, and those that are
not a beam's own ancestors are masked. So beams branch without copying a cache, as in the indirection tables
of FasterTransformer and TensorRT-LLM.

The model's own code stays as it is: it calls `cached_attention` through transformers' AttentionInterface and
hands down the pass as the keyword `cached`. Results are exact for full and sliding-window attention, grouped
queries and soft-capped scores.

Refuses to know how tokens are chosen.

Shapes: E slots, K beams, H heads, J key-value heads, G = H / J, D head width, P prefix tokens, L the longest
prompt's own tokens, T decode steps (of a store) or tokens (of a pass), F = T * K fed columns, W = P + L + F
all columns, Q = K * G query rows of a key-value head, X = E * Q.
Source: https://huggingface.co/docs/transformers/attention_interface
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from inference.beam_search import SearchState
from inference.kv_cache import KVCache
from qlora.base.device import triton_module
from qlora.packed.attention import REFUSED_KEYWORDS, attend_rows, refuse_inexact
from qlora.packed.handed_down import keep_keywords, keyword
from qlora.packed.stream import Rows

_kernel = triton_module("inference.decode_kernel")


class CachedPass(Protocol):
    """A forward pass, as the model's attention sees it."""

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
        """Attend from a layer's queries: [T, H, D]. Keys and values of the pass's tokens may be kept."""


@dataclass(frozen=True)
class Stretch:
    """Rows of a pass that stand behind one prefix [2, layers, J, P, D].

    store: called with (layer, k_TJD, v_TJD) to keep what was computed.
    """

    prefix: Tensor
    rows: Rows
    store: Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class PrefillPass:
    """A prefill of packed prompts, in one stretch for each prefix."""

    stretches: Sequence[Stretch]

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
        """Attend as CachedPass says; each token sees its prefix and its own row up to itself."""
        found, lengths = [], [one.rows.num_tokens for one in self.stretches]
        parts = zip(self.stretches, *(tensor.split(lengths) for tensor in (q_THD, k_TJD, v_TJD)), strict=True)
        for one, q, k, v in parts:
            one.store(layer, k, v)
            k_PJD, v_PJD = one.prefix[:, layer].transpose(1, 2)
            found.append(attend_rows(q, k, v, k_PJD, v_PJD, one.rows, scale, sliding_window, softcap))
        return found[0] if len(found) == 1 else torch.cat(found)


def store_prefix(cache: KVCache, slots: Tensor, prefix: Tensor) -> None:
    """Keep a prefix [2, layers, J, P, D] as the beginning of the prompts of `slots`."""
    p = prefix.shape[3]
    cache.prompts[:, :, slots, :, :p] = prefix[:, :, None]


def store_prompts(
    cache: KVCache, slots: Tensor, rows: Rows, first: int = 0
) -> Callable[[int, Tensor, Tensor], None]:
    """Return the `store` of a prefill, which keeps keys and values as the prompts of `slots`, in order.

    `first`: the place of a row's first token in its slot.
    """
    lengths = torch.tensor(rows.lengths, device=slots.device)
    row_starts = rows.bounds[:-1].long()
    slots_T = slots.repeat_interleave(lengths, output_size=rows.num_tokens)
    starts_T = row_starts.repeat_interleave(lengths, output_size=rows.num_tokens)
    columns_T = first + torch.arange(rows.num_tokens, device=slots.device) - starts_T

    def store(layer: int, k_TJD: Tensor, v_TJD: Tensor) -> None:
        for index, tensor_TJD in enumerate((k_TJD, v_TJD)):
            kept, new = _in_wide_elements(cache.prompts[index, layer].transpose(1, 2), tensor_TJD)
            kept[slots_T, columns_T] = new

    return store


def _in_wide_elements(*tensors: Tensor) -> Sequence[Tensor]:
    """View tensors in the widest elements that fit all of them: what is scattered costs by the element."""
    for dtype in (torch.complex128, torch.int64, torch.int32):
        ratio = dtype.itemsize // tensors[0].itemsize
        sizes = [(one.shape[-1], one.storage_offset(), *one.stride()[:-1]) for one in tensors]
        are_whole = all(size % ratio == 0 for one in sizes for size in one) if ratio > 1 else False
        if are_whole and all(one.stride(-1) == 1 for one in tensors):
            return [one.view(dtype) for one in tensors]
    return tensors


@dataclass
class DecodePass:
    """A decode step: one token of every beam of every slot, T = E * K tokens, with beams of a slot together.

    num_steps: a bound of the tokens that any slot's beams were fed, these included; no further fed columns
    are read. fed_E: those that each slot's beams were fed before.
    """

    cache: KVCache
    state: SearchState
    num_steps: int
    fed_E: Tensor = field(init=False)
    _masks: dict[int | None, Tensor] = field(default_factory=dict)
    _seen_columns: Any = None  # the kernel's, of all layers

    def __post_init__(self) -> None:
        self.fed_E = (self.state.steps_E - 1).clamp_(min=0)  # a slot without an example has chosen none

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
        """Attend as CachedPass says, with scores in the model's dtype and the softmax in float32.

        First, the new keys and values are written to the store.
        """
        if _kernel is not None and _kernel.supports(q_THD, self.state.next_EK.shape[1]):
            cache = self.cache
            state = self.state
            if self._seen_columns is None:
                self._seen_columns = _kernel.seen_columns(state.ancestry_EKT, self.fed_E)
            return _kernel.decode_attention(
                q_THD,
                k_TJD,
                v_TJD,
                cache.prefix[:, layer],
                cache.prompts[:, layer],
                cache.fed[:, layer],
                cache.own_E,
                self.fed_E,
                self._seen_columns,
                scale,
                sliding_window,
                softcap,
            )
        e, k = self.state.next_EK.shape
        j, d = k_TJD.shape[1:]
        g = q_THD.shape[1] // j
        slots = torch.arange(e, device=q_THD.device)
        for index, tensor_TJD in enumerate((k_TJD, v_TJD)):
            _write(self.cache.fed[index, layer], slots, self.fed_E, tensor_TJD.view(e, k, j, d))
        k_JPD, v_JPD = self.cache.prefix[:, layer]
        k_EJLD, v_EJLD = self.cache.prompts[:, layer]
        k_EJFD, v_EJFD = self.cache.fed[:, layer, :, :, : self.num_steps].flatten(3, 4)
        q_EJQD = (q_THD * scale).view(e, k, j, g, d).permute(0, 2, 1, 3, 4).reshape(e, j, k * g, d)
        # All slots share the prefix, so its products are one matrix product for each key-value head.
        q_JXD = q_EJQD.transpose(0, 1).reshape(j, e * k * g, d)
        prefix_EJQP = (q_JXD @ k_JPD.transpose(1, 2)).view(j, e, k * g, -1).transpose(0, 1)
        prompt_EJQL = q_EJQD @ k_EJLD.transpose(2, 3)
        fed_EJQF = q_EJQD @ k_EJFD.transpose(2, 3)
        scores_EJQW = torch.cat([prefix_EJQP, prompt_EJQL, fed_EJQF], dim=-1)
        if softcap is not None:
            scores_EJQW = torch.tanh(scores_EJQW / softcap) * softcap
        hidden = ~self._mask(sliding_window)[:, None, :, None]
        scores_EJKGW = scores_EJQW.view(e, j, k, g, -1).masked_fill(hidden, -torch.inf)
        weights_EJQW = scores_EJKGW.softmax(-1, dtype=torch.float32).to(q_THD.dtype).view(e, j, k * g, -1)
        lengths = (prefix_EJQP.shape[-1], prompt_EJQL.shape[-1], fed_EJQF.shape[-1])
        w_EJQP, w_EJQL, w_EJQF = weights_EJQW.split(lengths, dim=-1)
        w_JXP = w_EJQP.transpose(0, 1).reshape(j, e * k * g, lengths[0])
        out_EJQD = (w_JXP @ v_JPD).view(j, e, k * g, d).transpose(0, 1)
        out_EJQD = out_EJQD + w_EJQL @ v_EJLD + w_EJQF @ v_EJFD
        return out_EJQD.view(e, j, k, g, d).permute(0, 2, 1, 3, 4).reshape(e * k, j * g, d)

    def positions(self) -> Tensor:
        """Return the position of every fed token, [E, K]."""
        positions_E = self.cache.prefix.shape[3] + self.cache.own_E + self.fed_E
        return positions_E[:, None].expand_as(self.state.next_EK)

    def _mask(self, sliding_window: int | None) -> Tensor:
        """Return the columns that each beam sees, [E, K, W] bool; all layers with the same window share it.

        A beam sees the prefix, the slot's own prompt tokens and, of what was fed, its ancestors and itself.
        """
        if sliding_window not in self._masks:
            mask_EKW = torch.cat(self._seen(), dim=-1)
            if sliding_window is not None:
                p = self.cache.prefix.shape[3]
                positions_E = p + self.cache.own_E + self.fed_E
                distance_EW = positions_E[:, None] - self._column_positions()
                mask_EKW = mask_EKW & (distance_EW < sliding_window)[:, None]
            self._masks[sliding_window] = mask_EKW
        return self._masks[sliding_window]

    def _seen(self) -> list[Tensor]:
        """Return the columns that beams see without a window: [E, K, P], [E, K, L] and [E, K, F] bool."""
        e, k = self.state.next_EK.shape
        p = self.cache.prefix.shape[3]
        device = self.fed_E.device
        column_L = torch.arange(self.cache.prompts.shape[4], device=device)
        step_T = torch.arange(self.num_steps, device=device)
        is_own_EL = column_L < self.cache.own_E[:, None]
        is_fed_ET = step_T <= self.fed_E[:, None]
        ancestry_EKT = self.state.ancestry_EKT[:, :, : self.num_steps]
        is_ancestor_EKTK = ancestry_EKT[..., None] == torch.arange(k, device=device)
        return [
            torch.ones(p, dtype=torch.bool, device=device).expand(e, k, p),
            is_own_EL[:, None].expand(-1, k, -1),
            (is_ancestor_EKTK & is_fed_ET[:, None, :, None]).flatten(2),
        ]

    def _column_positions(self) -> Tensor:
        """Return the position of the token in each column, [E, W]."""
        e, k = self.state.next_EK.shape
        p = self.cache.prefix.shape[3]
        length = self.cache.prompts.shape[4]
        device = self.fed_E.device
        step_T = torch.arange(self.num_steps, device=device)
        fed_ET = p + self.cache.own_E[:, None] + step_T
        prompt_EL = p + torch.arange(length, device=device).expand(e, length)
        prefix_EP = torch.arange(p, device=device).expand(e, p)
        return torch.cat([prefix_EP, prompt_EL, fed_ET.repeat_interleave(k, dim=1)], dim=-1)


def use_cached_attention(model: PreTrainedModel) -> None:
    """Make `model(input_ids, position_ids, cached=CachedPass)` attend through the pass.

    Raises ValueError, as `refuse_inexact` does, for a model whose results would not be exact.
    """
    if model.config._attn_implementation == "cached":
        return
    refuse_inexact(model)
    keep_keywords(model)
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
    """Attend through the pass, in place of transformers' own attention functions.

    query [1, H, T, D], key and value [1, J, T, D] -> ([1, T, H, D], None). Raises ValueError if the pass did
    not arrive, or if the model asks for something that is not computed here.
    """
    cached = keyword("cached") if cached is None else cached
    is_refused = any(others.get(name) is not None for name in REFUSED_KEYWORDS)
    if cached is None or attention_mask is not None or is_refused:
        raise ValueError(
            f"{type(module).__name__} can't be served from this cache; use transformers' generate"
        )
    q_THD, k_TJD, v_TJD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    out_THD = cached.attend(layer, q_THD, k_TJD, v_TJD, scale, sliding_window, softcap)
    return out_THD[None], None


def _write(fed_EJTKD: Tensor, slots_E: Tensor, places_E: Tensor, new_EKJD: Tensor) -> None:
    """Put every slot's new rows at its own place."""
    fed_EJTKD.transpose(1, 2)[slots_E, places_E] = new_EKJD.transpose(1, 2)
