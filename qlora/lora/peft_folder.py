"""Owns PEFT folders: adapters on disk and as files in memory, in the layout that PEFT reads and writes.

A folder holds adapter_config.json, with the rank, alpha, target modules and the base's name, and
adapter_model.safetensors, with the matrices A and B of every targeted layer under the layer's name. So
adapters that are trained here load in PEFT, and PEFT's adapters are served here.

Refuses to know training and the tracking server.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from qlora.config import InputError

if TYPE_CHECKING:  # PEFT takes seconds to load; a command that only starts others' work need not wait for it
    from peft import LoraConfig, PeftModel

# Kinds of LoRA whose products are not those of two matrices beside a weight of the base as it is.
_OTHER_KINDS = {
    *("lora_bias", "layer_replication", "alora_invocation_tokens", "arrow_config", "megatron_config"),
    *("use_bdlora", "use_qalora", "kasa_config", "velora_config", "monteclora_config"),
}
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")  # which leave the base as it is
_NUMBERS = {"r": int, "lora_alpha": int | float}
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as the files of its PEFT folder, by name, which travel between processes and machines."""

    contents: Mapping[str, bytes]

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read a PEFT folder. Raises OSError if a file is missing."""
        return cls({name: (Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS)})

    def write(self, folder: str | Path) -> None:
        """Write a PEFT folder, and make it if there is none. Raises OSError."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.contents.items():
            (Path(folder) / name).write_bytes(content)

    @contextmanager
    def in_folder(self) -> Iterator[Path]:
        """Write the adapter to a temporary folder, and provide that folder within."""
        with tempfile.TemporaryDirectory() as folder:
            self.write(folder)
            yield Path(folder)

    @property
    def digest(self) -> str:
        """Return the SHA-256 (hexadecimal) of config and weights."""
        digest = hashlib.sha256()
        for name in (CONFIG, WEIGHTS):
            digest.update(hashlib.sha256(self.contents[name]).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class AdapterContent:
    """An adapter that is about to be written: its config and its matrices by name, in memory."""

    config: "LoraConfig"
    matrices: dict[str, Tensor]

    def write(self, folder: Path) -> None:
        """Write the files that `PeftModel.from_pretrained` reads, and make the folder if there is none."""
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(str(folder))
        matrices = {name: tensor.contiguous() for name, tensor in self.matrices.items()}
        save_file(matrices, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapter(model: PreTrainedModel, folder: str | Path) -> "PeftModel":
    """Load the adapter of a PEFT folder onto its base, as PEFT's model.

    Raises InputError if it doesn't fit.
    """
    check_adapter(folder)
    check_finite(folder)
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with torch.random.fork_rng():  # PEFT draws weights before it reads those of the folder
            adapted = PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise InputError(folder, f"doesn't fit this base: {_first_reason(error)}") from error
    held = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    on_one_side = held.symmetric_difference(matrix_shapes(folder))
    odd = sorted(name for name in on_one_side if ".lora_" in name)
    if odd:  # PEFT itself passes over them
        raise InputError(
            folder, f"doesn't fit this base: {len(odd)} matrices are on one side only, such as {odd[0]}"
        )
    return adapted


def check_adapter(folder: str | Path) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Raises InputError unless the folder holds a LoRA adapter in safetensors.
    """
    path = Path(folder)
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            folder, "has no adapter_config.json; give a PEFT folder or models:/NAME@ALIAS"
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(path / CONFIG, f"is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(path / CONFIG, "peft_type is not LORA; give a LoRA adapter")
    if others := [key for key in sorted(_OTHER_KINDS) if config.get(key)]:
        raise InputError(path / CONFIG, f"asks for {', '.join(others)}; give a LoRA adapter without")
    beginning = config.get("init_lora_weights", True)
    if beginning not in _PLAIN_BEGINNINGS:
        raise InputError(
            path / CONFIG,
            f"was begun by {beginning}, which changes the base that it belongs to; save it as a plain LoRA "
            "adapter, in PEFT by save_pretrained with path_initial_model_for_weight_conversion",
        )
    for key, kinds in _NUMBERS.items():
        if not isinstance(config.get(key, 1), kinds) or isinstance(config.get(key), bool):
            raise InputError(path / CONFIG, f"{key} must be a number, not {config[key]!r}")
    if config.get("r", 1) < 1 or not math.isfinite(config.get("lora_alpha", 1)):
        raise InputError(path / CONFIG, "r must be at least 1, and lora_alpha a finite number")
    if not (path / WEIGHTS).is_file():
        raise InputError(folder, f"holds no {WEIGHTS}; save the adapter again with safe_serialization=True")
    try:
        matrix_shapes(folder)
    except SafetensorError as error:
        raise InputError(path / WEIGHTS, f"is damaged: {error}") from None
    return config


def adapter_base(folder: str | Path) -> str:
    """Return the base, `name[@revision]`, that an adapter was trained on.

    Raises InputError if it names none.
    """
    config = check_adapter(folder)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not (name and isinstance(name, str) and isinstance(revision or "", str)):
        raise InputError(Path(folder) / CONFIG, "names no base_model_name_or_path; give --base-model too")
    return name + (f"@{revision}" if revision else "")


def matrix_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's matrices, by PEFT's names. Raises SafetensorError."""
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def check_finite(folder: str | Path) -> None:
    """Raise InputError, naming a matrix, for an adapter that holds what is no finite number."""
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if not torch.isfinite(file.get_tensor(name).float()).all():
                raise InputError(folder, f"{name} holds NaN or infinity; take an earlier checkpoint")


def _first_reason(error: Exception) -> str:
    """Return the first line of an error that is no heading, with which torch's errors begin."""
    for line in str(error).splitlines():
        if line.strip() and not line.endswith(":"):
            return line.strip()
    return repr(error)
