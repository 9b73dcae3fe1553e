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
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from qlora.base.device import compute_dtype, default_device, free_bytes
from qlora.base.loading import from_pretrained, load_bitsandbytes, no_progress_bar
from qlora.base.reference import BaseReference, check_has_weights, resolve_base, split_revision
from qlora.base.rotary import fix_frequencies, positions_of_one_set
from qlora.base.weights import LOADING_INFO, are_here, check_finite, check_loading, check_quantised
from qlora.config import BaseModelSettings, InputError, first_line

_log = logging.getLogger(__name__)
_MIXTURE_PARTS = {"experts", "router", "gate", "shared_expert_gate"}
_EXPERT_NAMES = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
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
    tokenizer = from_pretrained(AutoTokenizer, name, reference)
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


def template_digest(tokenizer: Any) -> str | None:
    """Return the SHA-256 (hexadecimal) of a tokenizer's chat template, None if it has none."""
    template = tokenizer.chat_template
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load_config(name: str) -> Any:
    """Load a base's transformers config, without its weights.

    Raises InputError unless transformers itself, without remote code, has its architecture as a causal
    language model.
    """
    config = from_pretrained(AutoConfig, name, resolve_base(name))
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(
            name, f"{config.model_type} is no causal language model; choose a decoder such as Llama or Qwen"
        )
    return config


def base_revision(name: str) -> str | None:
    """Return the hub commit that a base's config was loaded from, or None for a local or embedded base.

    The config itself says none (transformers 5.23): the folder in the cache does.
    """
    reference = resolve_base(name)
    if reference.kind != "hub":
        return None
    path = try_to_load_from_cache(reference.location, "config.json", revision=reference.revision)
    return Path(path).parent.name if isinstance(path, str) else None


def pinned(settings: BaseModelSettings) -> BaseModelSettings:
    """Return settings that name the hub commit a base's config was loaded from: all processes load that one.

    A local or embedded base's stay as they are.
    """
    revision = base_revision(settings.name)
    if revision is None:
        return settings
    return settings.model_copy(update={"name": f"{split_revision(settings.name)[0]}@{revision}"})


def context_tokens(config: Any) -> int | None:
    """Return how many tokens a base has positions for, as its config says; None if it does not.

    Positions that would change what an example is next to are not counted (qlora.base.rotary).
    """
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _CONTEXT_NAMES)
    told = next((value for value in found if isinstance(value, int) and value > 0), None)
    limits = [limit for limit in (told, positions_of_one_set(config)) if limit is not None]
    return min(limits, default=None)


def longest_example(config: Any, max_length: int) -> int:
    """Return where examples are cut, in tokens: `max_length`, or a base's context if that is shorter."""
    return min(max_length, context_tokens(config) or max_length)


def length_reason(config: Any, max_length: int) -> str:
    """Say why `longest_example` is shorter than `max_length`; nothing if it is not."""
    context = context_tokens(config)
    if context is None or context >= max_length:
        return ""
    if context == positions_of_one_set(config):
        return "behind which this base turns positions by other frequencies"
    return "which is all that this base has positions for"


def attention_shape(config: Any) -> AttentionShape:
    """Return the shape of attention that a model's config describes."""
    text = config.get_text_config()
    num_heads = text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    return AttentionShape(
        num_layers=text.num_hidden_layers, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
    )


def check_weights(settings: BaseModelSettings, config: Any) -> None:
    """Raise InputError for weights that `load_base` would refuse, as far as their headers show it.

    A hub's weights that are not on this machine are looked at when they are loaded.
    """
    check_quantised(config, settings)
    reference = resolve_base(settings.name)
    check_has_weights(reference)
    if are_here(reference):
        _check_headers(settings, config, reference)


def check_vocabulary(settings: BaseModelSettings, config: Any, tokenizer: Any) -> None:
    """Raise InputError for a tokenizer with tokens that a base has no embeddings for."""
    size, last = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values())
    if last >= size:
        raise InputError(
            settings.name,
            f"its tokenizer goes up to token {last}, and its config has embeddings for {size}; "
            "give a tokenizer and a model that belong together",
        )


def load_base(settings: BaseModelSettings, device: torch.device | None = None) -> PreTrainedModel:
    """Load the frozen model in eval mode on `device`, else on this process's.

    Raises InputError if it can't, and for weights that are missing, left over or no finite numbers.
    """
    load_bitsandbytes()
    reference = resolve_base(settings.name)
    config = load_config(settings.name)
    check_weights(settings, config)
    was_here = are_here(reference)
    device = device or default_device()
    dtype = compute_dtype(settings, device)
    model = from_pretrained(
        AutoModelForCausalLM,
        settings.name,
        reference,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        quantization_config=_nf4_config(dtype) if settings.quantization == "nf4" else None,
    )
    if not was_here:
        _check_headers(settings, config, reference)
    check_finite(settings.name, reference, device)
    fix_frequencies(model)
    keep_gradients_on_cpu(model)
    return model.requires_grad_(False).eval()


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the linear layers that an adapter may target: name -> (inputs, outputs).

    The head is none of them, nor are routers and experts of a mixture, nor its dense layers of the names that
    experts have: PEFT 0.21 takes those names, alone or in full, for all experts as one fused tensor, so that
    an adapter on such a layer could not be loaded back.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    names = {name: name.split(".") for name, _ in model.named_modules()}
    is_mixture = any("experts" in parts for parts in names.values())

    def is_left_alone(parts: list[str]) -> bool:
        return is_mixture and (parts[-1] in _EXPERT_NAMES or not _MIXTURE_PARTS.isdisjoint(parts))

    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if _is_plain_linear(module) and module is not head and not is_left_alone(names[name])
    }


def skeleton(config: Any) -> PreTrainedModel:
    """Build a model of this config without weights, to look at. Raises ValueError if there is none."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a family's code does with what it does not know
        raise ValueError(f"config.json describes no model: {first_line(error)}") from error


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


def _is_plain_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer and nothing more, as routers of some families are."""
    return type(module) is nn.Linear or (
        isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes.")
    )


def _nf4_layers(model: nn.Module) -> list[Any]:
    from bitsandbytes.nn import Linear4bit  # takes seconds to load

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def _check_headers(settings: BaseModelSettings, config: Any, reference: BaseReference) -> None:
    """Raise InputError unless the weights on this machine are, by their headers, those of the config.

    It is done without quantising, which would hide other shapes. A folder in NF4 has other tensors.
    """
    if getattr(config, "quantization_config", None) is None:
        options = {"device_map": "meta", "use_safetensors": True, **LOADING_INFO}
        with no_progress_bar():
            _, info = from_pretrained(AutoModelForCausalLM, settings.name, reference, **options)
        check_loading(settings.name, config.model_type, info)
