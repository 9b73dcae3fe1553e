"""Owns what a sweep that continues from an adapter takes over from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.config import InputError, TrialSettings
from qlora.lora.adapter import lay_out_matrices, matrix_names
from qlora.lora.peft_folder import CONFIG, check_adapter, matrix_shapes
from qlora.lora.targets import is_targeted
from tuning.model_size import ModelSize
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


def check_fits(start: tuple[str, Path], settings: TrialSettings, size: ModelSize) -> None:
    """Check that trials can begin with an adapter, whose name and folder are `start`.

    Raises InputError unless its matrices are those of the layers that `settings` target of a base of this
    size.
    """
    name, folder = start
    targeted = {
        layer: widths for layer, widths in size.layers.items() if is_targeted(layer, settings.target_modules)
    }
    expected = {
        matrix: place.shape
        for layer, places in lay_out_matrices(targeted, settings.lora_r).items()
        for matrix, place in zip(matrix_names(layer), places, strict=True)
    }
    found = matrix_shapes(folder)
    if odd := sorted(matrix for matrix in expected | found if found.get(matrix) != expected.get(matrix)):
        has, needs = (shapes.get(odd[0], "not there") for shapes in (found, expected))
        raise InputError(
            name,
            f"doesn't fit this base and its own config: {len(odd)} matrices differ, such as {odd[0]}, which "
            f"is {has} and should be {needs}; save the adapter again, or choose another",
        )
