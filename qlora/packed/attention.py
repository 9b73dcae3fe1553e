"""Owns attention over a PackedBatch, which transformers' AttentionInterface knows under the name `packed`.

The model's own code stays as it is: it calls `packed_attention` where it would call SDPA or FlashAttention,
and hands down the batch as the keyword `packed`. On GPUs the work is done by qlora.packed.flash_attention,
where that supports the model; else rows of similar length are laid out as padded grids, and each grid attends
with a mask.

Results are exact for causal decoders whose tokens meet only in attention: full or sliding window, grouped
queries, soft-capped scores. `refuse_inexact` refuses every other model.

Refuses to know how a stream is made.

Shapes: T stream tokens, P prefix tokens, S tokens of all rows, B a bucket's tokens, N its rows, L its longest
row, H heads, K key-value heads, D head width, A scored positions, V vocabulary.
Source: https://huggingface.co/docs/transformers/attention_interface
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from qlora.base.model import skeleton
from qlora.config import InputError
from qlora.packed.flash_attention import flash_attend, flash_attend_stream, supports
from qlora.packed.handed_down import keep_keywords, keyword
from qlora.packed.stream import Bucket, PackedBatch, Rows

_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Not cuDNN's: it plans anew for every shape (5 ms a layer on an H100), and shapes change every step.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_BYPASSED = "{} models don't use transformers' AttentionInterface; choose a decoder that does, such as Llama"
REFUSED_KEYWORDS = ("s_aux", "head_mask", "position_bias", "alibi")


class NotComputedError(ValueError):
    """A model asks attention for something that is not computed here."""


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make `model(input_ids, position_ids, packed=batch)` attend over a PackedBatch.

    Raises ValueError as `refuse_inexact` does.
    """
    refuse_inexact(model)
    keep_keywords(model)
    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", _no_mask)
    model.set_attn_implementation("packed")


def packed_logits(model: Any, batch: PackedBatch) -> Tensor:
    """Compute the logits from which a batch's scored tokens are predicted: [A, V].

    `model` must have packed attention. Only these positions go through the head.
    """
    out = model(
        input_ids=batch.input_ids_T[None],
        position_ids=batch.position_ids_T[None],
        packed=batch,
        use_cache=False,
        logits_to_keep=batch.predictors_A,
    )
    logits: Tensor = out.logits
    return logits.squeeze(0)  # squeeze, since the gradient of [0] is a copy


def check_attention(config: Any, name: str) -> None:
    """Raise InputError, naming the base, for a config whose model can't work with packed attention."""
    try:
        refuse_inexact(skeleton(config))
        if _count_calls(skeleton(config)) == 0:
            raise NotComputedError(_BYPASSED.format(config.model_type))
    except ValueError as error:
        raise InputError(name, str(error)) from None


def refuse_inexact(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose results would not be exact under this project's attention.

    Refused are tokens that meet outside attention (state space and linear attention layers, chunked
    attention), attention that bypasses AttentionInterface, and dropout inside attention.
    """
    config = model.config.get_text_config()
    family = model.config.model_type
    other_layers = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    is_told = getattr(model, "_supports_attention_backend", False)  # some families don't say so
    if model.config.is_encoder_decoder or not (is_told or _count_calls(skeleton(model.config))):
        raise NotComputedError(_BYPASSED.format(family))
    if getattr(model, "_is_stateful", False) or other_layers:
        kinds = ", ".join(sorted(other_layers)) or "state space"
        raise ValueError(
            f"{family} layers of type {kinds} mix tokens outside causal attention, so a packed stream "
            "would not be exact; choose a model with plain attention"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise ValueError(
            f"attention_dropout {config.attention_dropout} makes results depend on the batch layout; "
            "set it to 0 in config.json"
        )


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed: PackedBatch | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend over the stream, in place of transformers' own attention functions.

    query [1, H, T, D], key and value [1, K, T, D] -> ([1, T, H, D], None). Raises ValueError if the batch did
    not arrive, or if the model asks for something that is not computed here.
    """
    packed = keyword("packed") if packed is None else packed
    _check_call(module, attention_mask, packed, **others)
    assert packed is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # squeeze, since the gradient of [0] is a copy
    q_THD, k_TKD, v_TKD = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    if supports(q_THD, packed.longest, sliding_window, softcap):
        return flash_attend_stream(q_THD, k_TKD, v_TKD, packed.stretches, scale)[None], None
    if packed.known_stretches is not None:
        raise ValueError("a recorded pass needs FlashAttention, which doesn't compute this model's attention")
    nothing = slice(0, 0)
    outs_SHD = []
    for part in packed.parts:
        prefix = slice(part.start, part.suffix_start)
        suffixes = slice(part.suffix_start, part.end)
        for own, behind, rows in ((prefix, nothing, part.prefix), (suffixes, prefix, part.suffixes)):
            if rows.num_tokens:
                out_SHD = attend_rows(
                    q_THD[own],
                    k_TKD[own],
                    v_TKD[own],
                    k_TKD[behind],
                    v_TKD[behind],
                    rows,
                    scale,
                    sliding_window,
                    softcap,
                )
                outs_SHD.append(out_SHD)
    return torch.cat(outs_SHD)[None], None


def _count_calls(model: PreTrainedModel) -> int | None:
    """Call a model without weights, and count the calls of attention that would be this project's.

    Return None for a family that can't be called without weights, as one that looks at values. Raises
    NotComputedError as `packed_attention` does.
    """
    num_calls = 0

    def look(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **others: Any
    ) -> tuple[Tensor, None]:
        nonlocal num_calls
        num_calls += 1
        attention_mask = mask[0] if mask else others.pop("attention_mask", None)
        packed = others.pop("packed", None) or keyword("packed")
        _check_call(module, attention_mask, packed, **others)
        return value.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None

    keep_keywords(model)
    AttentionInterface.register("counted", look)
    AttentionMaskInterface.register("counted", _no_mask)
    model.set_attn_implementation("counted")
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        everywhere = torch.ones_like(tokens)  # given, so that nothing is looked for in positions
        model(input_ids=tokens, attention_mask=everywhere, packed=object(), use_cache=False)
    except NotComputedError:
        raise
    except Exception:
        return None
    return num_calls


def _check_call(
    module: torch.nn.Module, attention_mask: Tensor | None, packed: Any = None, **others: Any
) -> None:
    """Raise NotComputedError if a layer got no batch, or asks for something that is not computed here."""
    if packed is None:
        raise NotComputedError(
            f"{type(module).__name__} got no PackedBatch: call the model with packed=batch"
        )
    refused = [name for name in REFUSED_KEYWORDS if others.get(name) is not None]
    if refused or attention_mask is not None:
        asked_for = ", ".join(refused) or "an explicit mask"
        raise NotComputedError(f"packed attention doesn't compute {asked_for}; choose another model family")


def attend_rows(
    q_SHD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    k_PKD: Tensor,
    v_PKD: Tensor,
    rows: Rows,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend from consecutive rows, each behind the same prefix (P may be 0): [S, H, D]."""
    longest = rows.prefix_length + rows.longest
    if not torch.is_grad_enabled() and supports(q_SHD, longest, sliding_window, softcap):
        return flash_attend(q_SHD, k_SKD, v_SKD, k_PKD, v_PKD, rows, scale)
    groups = q_SHD.shape[1] // k_SKD.shape[1]
    start = 0
    outs_BHD = []
    for bucket in rows.buckets:
        end = start + bucket.num_tokens
        q_NHLD, k_NKLD, v_NKLD = (to_rows(tensor[start:end], bucket) for tensor in (q_SHD, k_SKD, v_SKD))
        out_NHLD = _attend(
            q_NHLD,
            _behind_prefix(k_PKD, k_NKLD, groups),
            _behind_prefix(v_PKD, v_NKLD, groups),
            rows.mask(bucket.row_length, sliding_window),
            scale,
            softcap,
        )
        outs_BHD.append(out_NHLD.transpose(1, 2).flatten(0, 1).index_select(0, bucket.slots_B))
        start = end
    return torch.cat(outs_BHD)


def to_rows(tensor_BHD: Tensor, bucket: Bucket) -> Tensor:
    """Lay a bucket's tokens [B, H, D] out as rows [N, H, L, D], zero where a row is short."""
    grid = tensor_BHD.new_zeros(bucket.num_rows * bucket.row_length, *tensor_BHD.shape[1:])
    # The backward of index_copy is a plain index_select; advanced indexing would accumulate.
    rows = grid.index_copy(0, bucket.slots_B, tensor_BHD)
    return rows.unflatten(0, (bucket.num_rows, bucket.row_length)).transpose(1, 2)


def _behind_prefix(prefix_PKD: Tensor, rows_NKLD: Tensor, groups: int) -> Tensor:
    """Put every row's keys (or values) behind the prefix's, one for each query head: [N, H, P + L, D]."""
    shared = prefix_PKD.transpose(0, 1)[None].expand(rows_NKLD.shape[0], -1, -1, -1)
    return torch.cat([shared, rows_NKLD], dim=2).repeat_interleave(groups, dim=1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Attend within a padded grid: [N, H, L, D].

    Soft-capped scores are computed step by step, as Gemma 2 does.
    """
    if softcap is None:
        with sdpa_kernel(_KERNELS):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = torch.tanh(query @ key.transpose(-1, -2) * scale / softcap) * softcap
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


def _no_mask(*_: Any, **__: Any) -> None:
    """Make no mask, in place of transformers' own mask functions: attention masks a PackedBatch itself."""
