"""Owns samplers: how a searched setting is drawn, checked before anything starts, and made Ray Tune's own.

Their names and meanings are Ray Tune's: https://docs.ray.io/en/latest/tune/api/search_space.html. A sampler
is refused if any of its draws could be refused later, by the settings of a trial.
"""

import math
from typing import Any

import numpy as np
from pydantic import ValidationError

from qlora.config import Settings, TrialData, TrialSettings, first_problem, meant_by

SAMPLERS: dict[str, tuple[str, ...]] = {
    "uniform": ("lower", "upper"),
    "quniform": ("lower", "upper", "q"),
    "loguniform": ("lower", "upper"),
    "qloguniform": ("lower", "upper", "q"),
    "randint": ("lower", "upper"),
    "qrandint": ("lower", "upper", "q"),
    "lograndint": ("lower", "upper"),
    "qlograndint": ("lower", "upper", "q"),
}
CHOICES = ("choice", "grid_search")
_UNBOUNDED = ("randn", "qrandn")
_FRACTIONS = (
    "learning_rate",
    "lora_alpha",
    "lora_dropout",
    "warmup_fraction",
    "weight_decay",
    "max_grad_norm",
)


def checked_sampler(key: str, sampler: dict[str, Any]) -> dict[str, list[Any]]:
    """Check the sampler of a setting and return it with numbers in place of texts that mean them.

    Raises ValueError, naming the key, for what is no sampler, and if a draw could be refused later.
    """
    where = f"search.{key}"
    known = {**TrialSettings.model_fields, **TrialData.model_fields}
    if key not in known:
        raise ValueError(
            f"{where} is no trial setting; {meant_by(key, known)}; there are: {', '.join(known)}"
        )
    if len(sampler) != 1:
        raise ValueError(f"{where} must hold one sampler, such as {{loguniform: [1.0e-5, 1.0e-3]}}")
    name, arguments = next(iter(sampler.items()))
    if name in _UNBOUNDED:
        raise ValueError(f"{where}.{name} has no bounds, but {key} has; use uniform or loguniform")
    if name not in (*SAMPLERS, *CHOICES):
        raise ValueError(f"{where}.{name} is no sampler; there are: {', '.join((*CHOICES, *SAMPLERS))}")
    if not isinstance(arguments, list) or not arguments:
        raise ValueError(f"{where}.{name} takes a list, not {arguments!r}")
    if name in CHOICES:
        return {name: [checked_setting(key, value, where) for value in arguments]}
    numbers = _checked_range(where, name, arguments)
    if key not in _FRACTIONS and "int" not in name and not _draws_whole_numbers(name, numbers):
        raise ValueError(
            f"{where}.{name} draws fractions, but {key} takes none; use choice, randint or qrandint"
        )
    for value in _extreme_draws(name, numbers):
        checked_setting(key, value, where)
    return {name: numbers}


def checked_setting(key: str, value: Any, where: str) -> Any:
    """Return the value of a trial setting as the settings hold it.

    Raises ValueError, naming `where`, if they refuse it.
    """
    owner: type[Settings] = TrialData if key in TrialData.model_fields else TrialSettings
    if owner is TrialData and value is None:
        raise ValueError(f"{where}: give values, not null")
    try:
        return owner.model_validate({key: value}).model_dump(mode="json")[key]
    except ValidationError as error:
        raise ValueError(f"{where}: {value!r}: {first_problem(error)[1]}") from None


def tune_sampler(sampler: dict[str, list[Any]]) -> Any:
    """Return a checked sampler as Ray Tune's."""
    from ray import tune

    name, arguments = next(iter(sampler.items()))
    return getattr(tune, name)(arguments) if name in CHOICES else getattr(tune, name)(*arguments)


def sampled_values(sampler: dict[str, list[Any]]) -> list[Any]:
    """Return the choices of a sampler, or the least and the greatest of its draws."""
    name, arguments = next(iter(sampler.items()))
    return list(arguments) if name in CHOICES else _extreme_draws(name, arguments)


def drawn_values(search: dict[str, dict[str, list[Any]]], key: str, count: int, seed: int = 0) -> list[Any]:
    """Draw values of a searched setting for trials one after another, the same for a seed in every call.

    Grids come in Ray Tune's order: of their keys, which are sorted, the first one changes fastest.
    """
    grids = {name: search[name]["grid_search"] for name in sorted(search) if "grid_search" in search[name]}
    if key in grids:
        values, repeats = grids[key], math.prod(len(grids[name]) for name in grids if name < key)
        return [values[number // repeats % len(values)] for number in range(count)]
    domain, random_state = tune_sampler(search[key]), np.random.default_rng(seed)
    return [domain.sample(random_state=random_state) for _ in range(count)]


def _checked_range(where: str, name: str, arguments: list[Any]) -> list[Any]:
    names = SAMPLERS[name]
    try:
        numbers = [float(value) for value in arguments if not isinstance(value, bool)]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != len(names) or len(arguments) != len(names) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{where}.{name} takes the numbers [{', '.join(names)}], not {arguments!r}")
    if "int" in name and any(number != int(number) for number in numbers):
        raise ValueError(f"{where}.{name} takes whole numbers, not {arguments!r}")
    if numbers[0] >= numbers[1]:
        raise ValueError(f"{where}.{name}: lower {numbers[0]:g} must be below upper {numbers[1]:g}")
    if "log" in name and numbers[0] <= 0:
        raise ValueError(f"{where}.{name}: lower must be above 0")
    if names[-1] == "q" and numbers[-1] <= 0:
        raise ValueError(f"{where}.{name}: q must be above 0")
    if names[-1] == "q":
        for bound in numbers[:2]:
            if not math.isclose(bound / numbers[-1], round(bound / numbers[-1])):
                raise ValueError(f"{where}.{name}: {bound:g} must be a multiple of q, {numbers[-1]:g}")
    return [int(number) for number in numbers] if "int" in name else numbers


def _draws_whole_numbers(name: str, numbers: list[Any]) -> bool:
    return SAMPLERS[name][-1] == "q" and float(numbers[-1]).is_integer()


def _extreme_draws(name: str, numbers: list[Any]) -> list[Any]:
    """Return the least and the greatest draw: plain integers and those with q = 1 stay below upper.

    Of samplers without bounds, which sweeps from before may have, the mean.
    """
    if name in _UNBOUNDED:
        return numbers[:1]
    low, high = numbers[:2]
    step = 1 if "int" in name else 0
    return [low, high - step if numbers[2:] in ([], [1]) else high]
