"""Owns the base model: from a name to one frozen model on a device, its tokenizer, and its shape.

QLoRA trains adapters on a base in NF4: 4-bit numbers whose 16 levels are the quantiles of a normal
distribution, which is how weights are distributed, with one scale for each block of 64 weights. A matrix
product dequantises the weights first. If memory allows, they can be dequantised once, which saves every pass
that work and gives the same results. Safetensors only, no remote code.

Refuses to know adapters and training.

Source: QLoRA, https://arxiv.org/abs/2305.14314
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from qlora.base.device import compute_dtype, default_device, free_bytes
from qlora.base.reference import BaseReference, resolve_base
from qlora.config import BaseModelSettings, InputError

_log = logging.getLogger(__name__)
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class AttentionShape:
    """The shape of a decoder's attention; if queries are grouped, there are fewer key-value heads."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a base.

    Raises InputError if it can't be loaded, or has no EOS token to end answers with.
    """
    reference = resolve_base(name)
    tokenizer = _from_pretrained(AutoTokenizer, name, reference)
    if tokenizer.eos_token_id is None:
        raise InputError(
            name,
            "its tokenizer has no EOS token, so answers would not end; "
            "add eos_token to tokenizer_config.json",
        )
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 (hexadecimal) of a tokenizer's vocabulary.

    Perplexities per token can be compared only between models with the same vocabulary.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    content = [vocabulary, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def load_config(name: str) -> Any:
    """Load a base's transformers config, without its weights.

    Raises InputError unless transformers itself, without remote code, has its architecture as a causal
    language model.
    """
    config = _from_pretrained(AutoConfig, name, resolve_base(name))
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(
            name, f"{config.model_type} is no causal language model; choose a decoder such as Llama or Qwen"
        )
    return config


def base_revision(config: Any) -> str | None:
    """Return the hub commit that a config was loaded from, or None for a local or embedded base."""
    return getattr(config, "_commit_hash", None)


def context_tokens(config: Any) -> int | None:
    """Return how many tokens a base has positions for, as its config says; None if it does not."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _CONTEXT_NAMES)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def longest_example(config: Any, max_length: int) -> int:
    """Return where examples are cut, in tokens: `max_length`, or a base's context if that is shorter."""
    return min(max_length, context_tokens(config) or max_length)


def attention_shape(config: Any) -> AttentionShape:
    """Return the shape of attention that a model's config describes."""
    text = config.get_text_config()
    num_heads = text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    return AttentionShape(
        num_layers=text.num_hidden_layers, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
    )


def load_base(settings: BaseModelSettings, device: torch.device | None = None) -> PreTrainedModel:
    """Load the frozen model in eval mode on `device`, else on this process's.

    Raises InputError if it can't.
    """
    reference = resolve_base(settings.name)
    device = device or default_device()
    dtype = compute_dtype(settings, device)
    model = _from_pretrained(
        AutoModelForCausalLM,
        settings.name,
        reference,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        quantization_config=_nf4_config(dtype) if settings.quantization == "nf4" else None,
    )
    keep_gradients_on_cpu(model)
    return model.requires_grad_(False).eval()


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the linear layers that an adapter may target, all but the head: name -> (inputs, outputs)."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def skeleton(config: Any) -> PreTrainedModel:
    """Build a model of this config without weights, to look at."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def keep_gradients_on_cpu(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first eval forward on CPUs with AVX512-BF16.

    The repacked form (bitsandbytes 0.50) has no backward: every later gradient through the base is None, with
    no more than a warning. Training that evaluates in between would go on with wrong gradients.
    """
    for module in _nf4_layers(model):
        module.support_avx512bf16_for_cpu = False


def is_nf4(model: nn.Module) -> bool:
    """Tell whether any linear layer of a model is in NF4."""
    return bool(_nf4_layers(model))


def dequantised_if_it_fits(model: Any) -> Any:
    """Dequantise a model's NF4 weights to its own dtype, if that takes less than half of the free memory.

    Return the model, dequantised or as it is. The weights still have NF4's values, so that an adapter is
    served on what it was tuned on, and no pass has to dequantise them.
    """
    layers = _nf4_layers(model)
    if not layers:
        return model
    needed = sum(module.in_features * module.out_features for module in layers) * model.dtype.itemsize
    free = free_bytes(model.device)
    fits = 2 * needed < free
    outcome = "dequantised" if fits else "kept in NF4"
    _log.info("%s: dequantised weights need %.1f GiB of %.1f free", outcome, needed / 2**30, free / 2**30)
    if not fits:
        return model
    return model.dequantize().requires_grad_(False).eval()


def _nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _nf4_layers(model: nn.Module) -> list[Any]:
    from bitsandbytes.nn import Linear4bit  # takes seconds to load

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def _from_pretrained(auto_class: Any, name: str, reference: BaseReference, **options: Any) -> Any:
    """Load with one of transformers' Auto classes. Raises InputError, naming the base, if that fails."""
    try:
        return auto_class.from_pretrained(
            reference.location,
            revision=reference.revision,
            trust_remote_code=False,
            local_files_only=reference.kind != "hub",
            **options,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else repr(error)
        raise InputError(name, f"can't be loaded: {reason}") from error
