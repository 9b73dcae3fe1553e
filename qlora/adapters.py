"""Owns LoRA adapters on a base: attaching a fresh one, PEFT's layout on disk, and what a folder says of its base.

Refuses to know training and the tracking server. Source of the layout: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from qlora.config import InputError, TrialSettings

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # of a PEFT folder, what makes the adapter


def attach_adapter(model: PreTrainedModel, settings: TrialSettings, base_name: str) -> PeftModel:
    """A trainable LoRA adapter on a frozen base, B = 0, so that it starts equal to the base.

    A is drawn from `settings.seed` alone. Raises InputError if no module has one of the target names.
    """
    targets = settings.target_modules if isinstance(settings.target_modules, str) else list(settings.target_modules)
    config = LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,  # type: ignore[arg-type]
                        target_modules=targets, bias="none", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise InputError("target_modules", f"{str(error).splitlines()[0]}") from error
    name, _, revision = base_name.partition("@")
    adapted.peft_config["default"].base_model_name_or_path = name
    adapted.peft_config["default"].revision = revision or None
    if model.device.type == "cpu":
        _quicken_dropout(adapted, settings.lora_dropout)
    return adapted  # type: ignore[return-value]


class CpuDropout(torch.nn.Module):
    """Dropout whose mask comes from NumPy's SFC64, seeded by one draw of torch's generator.

    The same distribution as torch.nn.Dropout to 2**-16 of p, and as repeatable; torch draws CPU masks element by element, which
    takes a fifth of a training step.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [...] -> x with elements zeroed with probability p and the rest scaled by 1 / (1 - p); x itself in eval mode."""
        if not self.training or self.p == 0:
            return x
        generator = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, ()))))
        kept = generator.integers(0, 2**16, x.shape, dtype=np.uint16) >= round(self.p * 2**16)
        return x * torch.from_numpy(kept).to(x.dtype).mul_(1 / (1 - self.p))


def _quicken_dropout(adapted: Any, p: float) -> None:
    for module in adapted.modules():
        if isinstance(module, LoraLayer) and p > 0:
            module.lora_dropout["default"] = CpuDropout(p)


def detach_adapter(adapted: PeftModel) -> PreTrainedModel:
    """The base without the adapter, in eval mode, as it was before `attach_adapter`."""
    return adapted.unload().eval()


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """Write adapter_config.json, adapter_model.safetensors and a model card: what `PeftModel.from_pretrained` reads."""
    adapted.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


def load_adapter(model: PreTrainedModel, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """The base with the adapter of a PEFT folder. Raises InputError if the adapter doesn't fit the base."""
    check_adapter(folder)
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, use_safetensors=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(folder, f"doesn't fit this base: {str(error).strip().splitlines()[0]}") from error


def check_adapter(folder: str | Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises InputError unless the folder holds a LoRA adapter in safetensors."""
    path = Path(folder)
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(folder, "has no adapter_config.json; give a PEFT folder or models:/NAME@ALIAS") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(path / "adapter_config.json", f"is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(path / "adapter_config.json", "peft_type is not LORA; give a LoRA adapter")
    if not (path / "adapter_model.safetensors").is_file():
        raise InputError(folder, "holds no adapter_model.safetensors; save the adapter again with safe_serialization=True")
    return config


def adapter_base(folder: str | Path) -> str:
    """The BASE, `name[@revision]`, that an adapter folder was trained on. Raises InputError if it names none."""
    config = check_adapter(folder)
    if not config.get("base_model_name_or_path"):
        raise InputError(Path(folder) / "adapter_config.json", "names no base_model_name_or_path; give --base-model too")
    revision = config.get("revision")
    return config["base_model_name_or_path"] + (f"@{revision}" if revision else "")
