"""Owns what a family is in GGUF: the name of its architecture, its settings, how its tensors are stored.

llama.cpp rotates pairs of neighbours where transformers rotates halves, so rows of q and k of Llama and
Mistral change places; Gemma's norms are stored with the 1 that its code adds. A config that llama.cpp's code
for the family does not carry out, such as a scaling of positions that it lacks, is refused by name.

Refuses to know tokenizers and files.

Source: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from qlora.base.model import attention_shape
from qlora.config import InputError

_GEMMA_PERIOD, _GEMMA_LOCAL_THETA = 6, 10000.0  # llama.cpp's own for Gemma 3
_YARN_KEYS = {
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}


@dataclass(frozen=True)
class Family:
    """A family in GGUF.

    rotates_pairs: rows of q and k change places. adds_one: norms hold 1 more. activation: of the MLP.
    unread: settings that transformers' GGUF reader does not read, so that they have to be given to it.
    """

    arch: str
    rotates_pairs: bool
    adds_one: bool
    activation: str
    unread: tuple[str, ...]


_LLAMA = Family("llama", True, False, "silu", ("rope_parameters", "attention_bias", "mlp_bias"))
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2", False, False, "silu", ("rope_parameters",)),
    "qwen3": Family("qwen3", False, False, "silu", ("rope_parameters", "head_dim", "attention_bias")),
    "gemma3_text": Family(
        "gemma3",
        False,
        True,
        "gelu_pytorch_tanh",
        ("rope_parameters", "layer_types", "query_pre_attn_scalar", "attention_bias"),
    ),
}


def check_family(config: Any, name: str, longest: int) -> Family:
    """Return a base's family. Raises InputError, naming the base, for a config that GGUF can't say.

    `longest`: tokens of the longest example.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InputError(
            name,
            f"{config.model_type} can't be exported as gguf, which is done for {', '.join(FAMILIES)}; "
            "use --format merged, and convert that with llama.cpp",
        )
    problem = _problem(config, family, longest)
    if problem:
        raise InputError(name, f"{problem}, which can't be said in GGUF; use --format merged")
    return family


def context_length(config: Any) -> int:
    """Return the tokens for which llama.cpp computes what transformers does.

    Its code for Mistral knows no window, so that is as many as the window has.
    """
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def add_settings(writer: gguf.GGUFWriter, config: Any, family: Family) -> None:
    """Write what llama.cpp has to know of a config."""
    shape, rope = attention_shape(config), _rope(config)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if family.arch == "llama":
        writer.add_rope_dimension_count(shape.head_dim)
    if family.arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)


def stored(config: Any, family: Family, name: str, value: Tensor) -> Tensor:
    """Return a float32 tensor as llama.cpp wants it."""
    shape = attention_shape(config)
    if family.rotates_pairs and ".q_proj." in name:
        return _paired(value, shape.num_heads)
    if family.rotates_pairs and ".k_proj." in name:
        return _paired(value, shape.num_kv_heads)
    if family.adds_one and name.endswith("norm.weight"):
        return value + 1
    return value


def rope_factors(config: Any) -> Tensor | None:
    """Return by how much Llama 3 slows each frequency, which llama.cpp reads as a tensor; None for others.

    It is transformers' own result: the plain frequencies over the scaled ones.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = attention_shape(config).head_dim
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return plain / scaled


def _paired(value: Tensor, num_heads: int) -> Tensor:
    """Bring the rows of each head from halves to pairs of neighbours."""
    rows = value.unflatten(0, (num_heads, 2, -1))
    return rows.transpose(1, 2).flatten(0, 2).contiguous()


def _rope(config: Any) -> dict[str, Any]:
    """Return the settings of a config's rotary positions; Gemma's are those of its global layers."""
    rope = dict(config.rope_parameters)
    return dict(rope["full_attention"]) if "full_attention" in rope else rope


def _problem(config: Any, family: Family, longest: int) -> str | None:
    """Say what of a config llama.cpp does not carry out; None if it is all."""
    rope = _rope(config)
    kind, activation = rope.get("rope_type", "default"), getattr(config, "hidden_act", None)
    activation = getattr(config, "hidden_activation", None) or activation
    known = ("default", "linear", "yarn", *(["llama3"] if family.arch == "llama" else []))
    if kind not in known or (family.arch == "gemma3" and kind == "yarn"):
        return f"its positions are scaled as {kind}"
    if kind == "yarn" and (more := {key for key in rope if rope[key] is not None} - _YARN_KEYS):
        return f"its yarn has {', '.join(sorted(more))}"
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        return "only a part of its heads is rotated"
    if activation != family.activation:
        return f"its activation is {activation}"
    if family.arch.startswith("qwen") and getattr(config, "use_sliding_window", False):
        return "it has sliding windows"
    if longest > context_length(config):
        return (
            f"it has a sliding window of {context_length(config)} tokens, and examples have up to {longest} "
            "(--max-length cuts them)"
        )
    return _problem_of_gemma(config) if family.arch == "gemma3" else None


def _problem_of_gemma(config: Any) -> str | None:
    """Say what of Gemma 3's config is not as llama.cpp has it built in; None if all is."""
    local = dict(config.rope_parameters).get("sliding_attention") or {}
    layers = range(1, config.num_hidden_layers + 1)
    kinds = ["sliding_attention" if layer % _GEMMA_PERIOD else "full_attention" for layer in layers]
    if list(config.layer_types) != kinds:
        return f"not every {_GEMMA_PERIOD}th of its layers is global"
    if (local.get("rope_theta"), local.get("rope_type", "default")) != (_GEMMA_LOCAL_THETA, "default"):
        return "its local layers rotate in another way than Gemma 3's"
    if config.query_pre_attn_scalar != config.head_dim:
        return f"its query_pre_attn_scalar is {config.query_pre_attn_scalar}, and not head_dim"
    if config.final_logit_softcapping or config.attn_logit_softcapping:
        return "it caps logits"
    return None
