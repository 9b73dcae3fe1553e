"""Owns what a sweep that continues from an adapter takes over from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.config import InputError
from qlora.lora.peft_folder import check_adapter
from workflows.model_choice import local_adapter

_FIXED = ("r", "lora_alpha", "target_modules")


@dataclass(frozen=True)
class StartingPoint:
    """An adapter that trials go on from: its PEFT folder, how it is called for good (a models:/ URI with a version, or the folder), the
    base it belongs to, and the settings that it fixes."""

    folder: Path
    name: str
    base: str
    settings: dict[str, Any]


def starting_point(adapter: str) -> StartingPoint:
    """Of a PEFT folder or a models:/ URI. Raises InputError for one that trials can't go on from."""
    folder, base, registered = local_adapter(adapter)
    assert folder is not None and base is not None, "an adapter was named"
    config = check_adapter(folder)
    unknown = [
        key
        for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
        if config.get(key)
    ]
    if unknown:
        raise InputError(
            adapter,
            f"has {', '.join(unknown)}, which trials don't have; choose an adapter that was trained here",
        )
    missing = [key for key in _FIXED if not config.get(key)]
    if missing:
        raise InputError(
            Path(folder) / "adapter_config.json",
            f"says no {', '.join(missing)}; choose an adapter that was trained here",
        )
    targets = config["target_modules"]
    return StartingPoint(
        Path(folder),
        registered.model_uri if registered else folder,
        base,
        {
            "lora_r": config["r"],
            "lora_alpha": config["lora_alpha"],
            "target_modules": sorted(targets) if isinstance(targets, list) else targets,
        },
    )
