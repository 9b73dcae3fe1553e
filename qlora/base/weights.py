"""Owns whether a base's weights are those that its config asks for, and are numbers.

transformers fills a weight that a folder lacks with random numbers, passes over one that it has no place for,
and says so in its log. Here both are errors. Names and shapes stand in the headers of safetensors files, so
that they are compared before any weight is read.

Refuses to know tokenizers and attention.

Source: https://huggingface.co/docs/safetensors
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor

from qlora.base.reference import BaseReference
from qlora.config import BaseModelSettings, InputError

LOADING_INFO: dict[str, bool] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
_FIRST_FILES = ("model.safetensors", "model.safetensors.index.json")


def are_here(reference: BaseReference) -> bool:
    """Tell whether a base's weights are on this machine; a hub's may not have been fetched yet."""
    if reference.kind != "hub":
        return True
    found = (
        try_to_load_from_cache(reference.location, name, revision=reference.revision) for name in _FIRST_FILES
    )
    return any(isinstance(path, str) for path in found)


def check_loading(name: str, family: str, info: Mapping[str, Any]) -> None:
    """Raise InputError, naming the base, unless weights and model fit each other.

    `info` is what transformers says of its loading, where it is called with LOADING_INFO.
    """
    if wrong := sorted(info["mismatched_keys"]):
        key, found, wanted = wrong[0]
        raise InputError(
            name,
            f"config.json belongs to another model: {key} is {_shape(found)}, and should be "
            f"{_shape(wanted)} by config.json; give a folder whose config.json is the weights' own",
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            name,
            f"{_count(missing, 'weight')} missing, such as {missing[0]}, and would be random; give a folder "
            "that holds all of them, under the names that transformers saves them by",
        )
    if left := sorted(info["unexpected_keys"]):
        raise InputError(
            name,
            f"{_count(left, 'weight')} left over, such as {left[0]}: {family} models have no place "
            "for it; give a folder that holds this model alone",
        )


def check_quantised(config: Any, settings: BaseModelSettings) -> None:
    """Raise InputError for weights that are stored in another form than the settings' quantisation."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    form = stored if isinstance(stored, Mapping) else stored.to_dict()
    is_nf4 = bool(form.get("load_in_4bit")) and form.get("bnb_4bit_quant_type") == "nf4"
    if not is_nf4:
        method = form.get("quant_method", "a method without a name")
        raise InputError(
            settings.name,
            f"its weights are quantised by {method}, and not in NF4; "
            "give the model's own weights in bfloat16 or float32",
        )
    if settings.quantization != "nf4":
        raise InputError(
            settings.name, "its weights are stored in NF4; use quantization nf4, or the model's own weights"
        )


def check_finite(name: str, reference: BaseReference, device: torch.device) -> None:
    """Raise InputError, naming the base, for a weight that holds a NaN or an infinity.

    The files are read, since NF4 has no NaN: what was none looks like any other weight once it is quantised.
    Each tensor goes to `device`, and is gone with the next.
    """
    for path in _files(reference):
        with safe_open(path, "pt", device=str(device)) as file:
            names = file.keys()
            for key in names:
                if not _is_finite(file.get_tensor(key)):
                    raise InputError(name, f"its weight {key} holds NaN or infinity; give another copy of it")


def _is_finite(tensor: Tensor) -> bool:
    """Tell whether all of a tensor's numbers are finite; their sum, which is quicker, says so at once."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def _files(reference: BaseReference) -> list[Path]:
    """Return a base's safetensors files on this machine: those of its index, if it has one."""
    location = reference.location
    if reference.kind == "hub":
        location = snapshot_download(location, revision=reference.revision, local_files_only=True)
    one, index = (Path(location) / name for name in _FIRST_FILES)
    if one.exists():
        return [one]
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [index.with_name(name) for name in sorted(names)]


def _count(names: list[str], what: str) -> str:
    return f"1 {what} is" if len(names) == 1 else f"{len(names)} {what}s are"


def _shape(shape: Any) -> str:
    return " x ".join(map(str, shape))
