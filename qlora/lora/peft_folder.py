"""Owns PEFT folders: what one says of its base, PEFT's model of it, for serving, and writing one.

Refuses to know training and the tracking server. Source of the layout: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from qlora.config import InputError

# PEFT takes seconds to load, which a command that only starts others' work need not wait for
if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# of a PEFT folder, what makes the adapter
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class AdapterContent:
    """What a PEFT folder is made of: its config and its matrices by name, in memory."""

    config: "LoraConfig"
    matrices: dict[str, Tensor]

    def write(self, folder: Path) -> None:
        """Write what `PeftModel.from_pretrained` reads: adapter_config.json and adapter_model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(str(folder))
        save_file(
            {name: tensor.contiguous() for name, tensor in self.matrices.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )


def load_adapter(model: PreTrainedModel, folder: str | Path) -> "PeftModel":
    """The base with the adapter of a PEFT folder. Raises InputError if the adapter doesn't fit the base."""
    check_adapter(folder)
    from peft import PeftModel, get_peft_model_state_dict

    try:
        adapted = PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = next(
            line.strip()
            for line in [*str(error).splitlines(), repr(error)]
            if line.strip() and not line.endswith(":")
        )
        raise InputError(folder, f"doesn't fit this base: {reason}") from error
    differing = set(_matrix_names(folder)) ^ set(
        get_peft_model_state_dict(adapted, save_embedding_layers=False)
    )
    if odd := sorted(name for name in differing if ".lora_" in name):  # PEFT passes over them
        raise InputError(
            folder, f"doesn't fit this base: {len(odd)} matrices are on one side only, such as {odd[0]}"
        )
    return adapted


def check_adapter(folder: str | Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises InputError unless the folder holds a LoRA adapter in safetensors."""
    path = Path(folder)
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            folder, "has no adapter_config.json; give a PEFT folder or models:/NAME@ALIAS"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(path / "adapter_config.json", f"is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(path / "adapter_config.json", "peft_type is not LORA; give a LoRA adapter")
    if not (path / "adapter_model.safetensors").is_file():
        raise InputError(
            folder, "holds no adapter_model.safetensors; save the adapter again with safe_serialization=True"
        )
    try:
        _matrix_names(folder)
    except SafetensorError as error:
        raise InputError(path / "adapter_model.safetensors", f"is damaged: {error}") from None
    return config


def adapter_base(folder: str | Path) -> str:
    """The BASE, `name[@revision]`, that an adapter folder was trained on. Raises InputError if it names none."""
    config = check_adapter(folder)
    if not config.get("base_model_name_or_path"):
        raise InputError(
            Path(folder) / "adapter_config.json", "names no base_model_name_or_path; give --base-model too"
        )
    revision = config.get("revision")
    return config["base_model_name_or_path"] + (f"@{revision}" if revision else "")


def _matrix_names(folder: str | Path) -> list[str]:
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())
