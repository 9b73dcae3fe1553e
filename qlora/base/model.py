"""Owns the base: a name -> one frozen model on a device, NF4-quantised unless told otherwise, and its tokenizer.

Safetensors only, no remote code. Refuses to know adapters and training.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from qlora.base.reference import BaseReference, resolve_base
from qlora.config import BaseModelSettings, InputError

CPU_PASS_TOKENS = 1152


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(settings: BaseModelSettings, device: torch.device) -> torch.dtype:
    """The dtype that products are computed in: bfloat16 on GPUs that have it, float32 on CPUs, where it is faster."""
    if settings.dtype != "auto":
        return torch.float32 if settings.dtype == "float32" else torch.bfloat16
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take on a device: unallocated on a GPU; on a CPU what is available without swapping,
    within the limit of a container (cgroup v2)."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    available = next(
        line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")
    )
    free = int(available.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        files = dict(
            line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        ).get("inactive_file", "0")
        # cached files give way
        free = min(free, int(most) - int(used.read_text()) + int(files))
    return max(0, free)


def default_token_budget() -> int:
    """Tokens of one pass that fit a device comfortably. On a CPU small passes are also the fastest: memory stays warm."""
    return 8192 if default_device().type == "cuda" else CPU_PASS_TOKENS


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a BASE. Raises InputError if it can't be had, or has no EOS token to end answers with."""
    reference = resolve_base(name)
    tokenizer = _from_pretrained(AutoTokenizer, name, reference)
    if tokenizer.eos_token_id is None:
        raise InputError(
            name,
            "its tokenizer has no EOS token, so answers would not end; add eos_token to tokenizer_config.json",
        )
    return tokenizer


def load_base(settings: BaseModelSettings, device: torch.device | None = None) -> PreTrainedModel:
    """The frozen model in eval mode on `device`. Raises InputError if it can't be had."""
    reference, device = resolve_base(settings.name), device or default_device()
    dtype = compute_dtype(settings, device)
    quantization = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        if settings.quantization == "nf4"
        else None
    )
    model = _from_pretrained(
        AutoModelForCausalLM,
        settings.name,
        reference,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        quantization_config=quantization,
    )
    keep_gradients_on_cpu(model)
    return model.requires_grad_(False).eval()


def keep_gradients_on_cpu(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first eval forward on AVX512-BF16 CPUs.

    The repacked form (bitsandbytes 0.50) has no backward: every later gradient through the base is None, with a warning
    only. Training that evaluates in between would go on with wrong gradients.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def base_revision(model: PreTrainedModel) -> str | None:
    """The hub commit that a model was loaded from; None for a local or embedded base."""
    return getattr(model.config, "_commit_hash", None)


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
        raise InputError(
            name, f"can't be loaded: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}"
        ) from error


def load_config(name: str) -> Any:
    """The base's transformers config, read without its weights.

    Raises InputError unless transformers knows its architecture as a causal language model, without remote code.
    """
    config = _from_pretrained(AutoConfig, name, resolve_base(name))
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(
            name,
            f"{config.model_type} is no causal language model; choose a decoder such as Llama, Qwen or Mistral",
        )
    return config
