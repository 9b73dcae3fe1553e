"""Owns what a sweep that continues from an adapter takes over from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.config import InputError
from qlora.lora.peft_folder import CONFIG, check_adapter
from workflows.model_choice import find_adapter

_FIXED = ("r", "lora_alpha", "target_modules")
_UNKNOWN = {
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"),
    *("target_parameters", "trainable_token_indices"),
    *("layers_to_transform", "layers_pattern", "exclude_modules"),
}


@dataclass(frozen=True)
class StartingPoint:
    """An adapter that trials go on from.

    folder: its PEFT folder. name: how it is called for good, a models:/ URI with a version, or the folder.
    base: that it belongs to. settings: of a trial, which it fixes.
    """

    folder: Path
    name: str
    base: str
    settings: dict[str, Any]


def starting_point(adapter: str) -> StartingPoint:
    """Find a PEFT folder or a models:/ URI. Raises InputError for an adapter that trials can't go on from."""
    found = find_adapter(adapter)
    config = check_adapter(found.folder)
    unknown = [key for key in sorted(_UNKNOWN) if config.get(key)]
    if config.get("bias", "none") != "none":
        unknown.append("bias")
    if unknown:
        raise InputError(
            adapter,
            f"has {', '.join(unknown)}, which trials don't have; choose an adapter that was trained here",
        )
    base = found.base
    if missing := [key for key in _FIXED if not config.get(key)]:
        raise InputError(
            found.folder / CONFIG, f"says no {', '.join(missing)}; choose an adapter that was trained here"
        )
    targets = config["target_modules"]
    settings = {
        "lora_r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
    }
    name = found.registered.model_uri if found.registered else str(found.folder)
    return StartingPoint(found.folder, name, base, settings)
