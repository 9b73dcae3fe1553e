"""Owns the base model: a name -> one frozen model on a device, its tokenizer, and its shape as its config has it.

The model is quantised to NF4 unless told otherwise; its NF4 values can be dequantised once, which saves every
pass that work. Safetensors only, no remote code. Refuses to know adapters and training.

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


@dataclass(frozen=True)
class AttentionShape:
    """A decoder's layers, query heads, key-value heads (fewer if queries are grouped) and the width of a head."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a BASE. Raises InputError if it can't be had, or has no EOS token to end answers with."""
    reference = resolve_base(name)
    tokenizer = _from_pretrained(AutoTokenizer, name, reference)
    if tokenizer.eos_token_id is None:
        raise InputError(
            name,
            "its tokenizer has no EOS token, so answers would not end; add eos_token to tokenizer_config.json",
        )
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 (hexadecimal) of what tokens there are: perplexities per token compare under equal ones only."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    content = [vocabulary, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def load_config(name: str) -> Any:
    """Load the base's transformers config, without its weights.

    Raises InputError unless transformers knows its architecture as a causal language model, without remote code.
    """
    config = _from_pretrained(AutoConfig, name, resolve_base(name))
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(
            name, f"{config.model_type} is no causal language model; choose a decoder such as Llama or Qwen"
        )
    return config


def base_revision(config: Any) -> str | None:
    """Return the hub commit that a config was loaded from; None for a local or embedded base."""
    return getattr(config, "_commit_hash", None)


def attention_shape(config: Any) -> AttentionShape:
    """Read a model's attention off its config."""
    text = config.get_text_config()
    num_heads = text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    return AttentionShape(text.num_hidden_layers, num_heads, num_kv_heads, head_dim)


def load_base(settings: BaseModelSettings, device: torch.device | None = None) -> PreTrainedModel:
    """Load the frozen model in eval mode on `device`. Raises InputError if it can't be had."""
    reference, device = resolve_base(settings.name), device or default_device()
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
    """List the linear layers that an adapter may target, all but the head: name -> (inputs, outputs)."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def keep_gradients_on_cpu(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first eval forward on AVX512-BF16 CPUs.

    The repacked form (bitsandbytes 0.50) has no backward: every later gradient through the base is None, with a
    warning only. Training that evaluates in between would go on with wrong gradients.
    """
    for module in _nf4_layers(model):
        module.support_avx512bf16_for_cpu = False


def is_nf4(model: nn.Module) -> bool:
    """Tell whether a model has linear layers in NF4."""
    return bool(_nf4_layers(model))


def dequantised_if_it_fits(model: Any) -> Any:
    """Return a model with its NF4 values in its own dtype, if that takes less than half of the free memory.

    Else the model as it is. What was tuned on NF4 is thus what is served, and no pass dequantises.
    """
    layers = _nf4_layers(model)
    if not layers:
        return model
    needed = sum(module.in_features * module.out_features for module in layers) * model.dtype.itemsize
    free = free_bytes(model.device)
    fits = 2 * needed < free
    _log.info(
        "%s: dequantised weights need %.1f GiB of %.1f free",
        "dequantised" if fits else "kept in NF4",
        needed / 2**30,
        free / 2**30,
    )
    return model.dequantize().requires_grad_(False).eval() if fits else model


def _nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _nf4_layers(model: nn.Module) -> list[Any]:
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def _from_pretrained(auto_class: Any, name: str, reference: BaseReference, **options: Any) -> Any:
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
        raise InputError(name, f"can't be loaded: {lines[0] if lines else repr(error)}") from error
