"""Owns the search space file: YAML + overrides -> one validated Space, and its translation to Ray Tune's own objects.

Samplers have Ray Tune's names and meanings: https://docs.ray.io/en/latest/tune/api/search_space.html. Refuses to know how a
trial trains.
"""

import itertools
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from qlora.config import (
    BaseModelSettings,
    InputError,
    Number,
    Settings,
    TrialSettings,
    first_problem,
    validated,
)

SAMPLERS: dict[str, tuple[str, ...]] = {
    "uniform": ("lower", "upper"),
    "quniform": ("lower", "upper", "q"),
    "loguniform": ("lower", "upper"),
    "qloguniform": ("lower", "upper", "q"),
    "randn": ("mean", "sd"),
    "qrandn": ("mean", "sd", "q"),
    "randint": ("lower", "upper"),
    "qrandint": ("lower", "upper", "q"),
    "lograndint": ("lower", "upper"),
    "qlograndint": ("lower", "upper", "q"),
}
CHOICES = ("choice", "grid_search")
REPORTED = ("learning_rate", "lora_r", "lora_alpha", "lora_dropout", "epochs")


class DataSettings(Settings):
    """Data files, and how many of their first examples to use (all by default)."""

    train: str
    public: str
    train_examples: int | None = Field(None, ge=1)
    public_examples: int | None = Field(None, ge=1)


class RandomSearch(Settings):
    """Ray Tune's own generator: independent samples, and every value of each grid_search."""

    type: Literal["random"] = "random"


class OptunaSearch(Settings):
    """Ray Tune's Optuna integration (the extra `optuna`): TPE over what has finished so far."""

    type: Literal["optuna"]


class Asha(Settings):
    """Ray Tune's ASHAScheduler on public perplexity.

    `time_attr` says what trials are compared by: `schedule_percent`, the share of a trial's own schedule that it has done,
    so that unequal epoch counts and decaying learning rates meet fairly; or `step`, optimizer steps.
    """

    type: Literal["asha"] = "asha"
    time_attr: Literal["schedule_percent", "step"] = "schedule_percent"
    max_t: Number = Field(100, gt=0)
    grace_period: Number = Field(25, gt=0)
    reduction_factor: Number = Field(2, gt=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.time_attr == "schedule_percent" and self.max_t > 100:
            raise ValueError(f"max_t is {self.max_t:g} percent of the schedule; it can't be above 100")
        if self.grace_period >= self.max_t:
            raise ValueError(
                f"grace_period {self.grace_period:g} must be below max_t {self.max_t:g}, or nothing is ever compared"
            )
        return self

    @property
    def rungs(self) -> list[float]:
        """The points below max_t where trials are compared, in units of time_attr."""
        powers = itertools.count()
        return list(
            itertools.takewhile(
                lambda rung: rung < self.max_t, (self.grace_period * self.reduction_factor**k for k in powers)
            )
        )


class NoEarlyStopping(Settings):
    """Ray Tune's FIFOScheduler: every trial runs its whole schedule."""

    type: Literal["fifo"]


class TrialResources(Settings):
    """What one trial asks Ray for: CPUs, and a share of one GPU."""

    cpu: Number = Field(1, ge=0)
    gpu: Number = Field(0, ge=0, le=1)


class Space(Settings):
    """A whole search space file. `trial` holds fixed settings, `search` a sampler for each searched one.

    `trials_per_gpu`: how many trials share a GPU and the base on it, `auto` for as many as the plan finds room for; it takes the
    place of resources_per_trial.gpu.
    """

    base_model: BaseModelSettings = BaseModelSettings()
    data: DataSettings
    prompt: str = "default"
    trial: dict[str, Any] = Field(default_factory=dict)
    search: dict[str, dict[str, Any]]
    num_samples: int = Field(8, ge=1)
    searcher: RandomSearch | OptunaSearch = Field(RandomSearch(), discriminator="type")
    scheduler: Asha | NoEarlyStopping = Field(Asha(), discriminator="type")
    resources_per_trial: TrialResources = TrialResources()
    trials_per_gpu: Literal["auto"] | Annotated[int, Field(ge=1)] | None = None
    max_concurrent_trials: int | None = Field(None, ge=1)
    max_failures: int = Field(2, ge=0)
    budget_tokens: int | None = Field(None, ge=1, le=65536)
    registered_model: str | None = Field(None, min_length=1, pattern=r"^[^/:@]+$")
    storage: str | None = None
    seed: int = Field(42, ge=0)

    @field_validator("search")
    @classmethod
    def _samplers_fit(cls, search: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if not search:
            raise ValueError("search is empty; give at least one setting a sampler")
        for key, sampler in search.items():
            _check_sampler(key, sampler)
        return search

    @model_validator(mode="after")
    def _trial_fits(self) -> Self:
        both = sorted(set(self.trial) & set(self.search))
        if both:
            raise ValueError(f"{', '.join(both)} stands under both trial and search; keep one")
        for key in self.trial:
            _check_setting(key, self.trial[key], f"trial.{key}")
        refused = {name for sampler in self.search.values() for name in sampler} & {
            "grid_search",
            "randn",
            "qrandn",
        }
        if self.searcher.type == "optuna" and refused:
            raise ValueError(
                f"searcher optuna takes no {', '.join(sorted(refused))}; use another sampler, or the random searcher"
            )
        return self

    def trial_settings(self, config: dict[str, Any]) -> TrialSettings:
        """The full settings of one sampled configuration."""
        return TrialSettings.model_validate({**self.trial, **config})

    @property
    def wants_gpu(self) -> bool:
        """Whether a trial asks for a GPU or a share of one."""
        return self.trials_per_gpu is not None or self.resources_per_trial.gpu > 0

    @property
    def num_trials(self) -> int:
        """num_samples times the size of the grid."""
        total = self.num_samples
        for sampler in self.search.values():
            total *= len(sampler.get("grid_search", [None]))
        return total


def load_space(path: str | Path, overrides: list[str], fixed: dict[str, Any] | None = None) -> Space:
    """The Space of a YAML file with `dotted.key=value` overrides, values read as YAML. `fixed`: trial settings that hold whatever the
    file says of them.

    Raises InputError naming file and key.
    """
    content = read_settings(path, overrides, "search_spaces/quickstart.yaml")
    for key, value in (fixed or {}).items():
        if isinstance(content.get("search"), dict):
            content["search"].pop(key, None)
        _override(content, f"trial.{key}={json.dumps(value)}")
    return validated(path, lambda: Space.model_validate(content))


def read_settings(path: str | Path, overrides: list[str], model: str) -> dict[str, Any]:
    """The mapping of a YAML file with `dotted.key=value` overrides, values read as YAML. Raises InputError naming file and key, and
    `model`, a file to learn from."""
    content = _read_yaml(Path(path), model)
    for override in overrides:
        _override(content, override)
    return content


def tune_space(space: Space) -> dict[str, Any]:
    """The search part as Ray Tune's param_space."""
    from ray import tune

    samplers = {key: _sampler_parts(sampler) for key, sampler in space.search.items()}
    return {
        key: getattr(tune, name)(arguments) if name in CHOICES else getattr(tune, name)(*arguments)
        for key, (name, arguments) in samplers.items()
    }


def _check_sampler(key: str, sampler: dict[str, Any]) -> None:
    where = f"search.{key}"
    if key not in TrialSettings.model_fields:
        raise ValueError(f"{where} is no trial setting; there are: {', '.join(TrialSettings.model_fields)}")
    if len(sampler) != 1:
        raise ValueError(f"{where} must hold one sampler, such as {{loguniform: [1.0e-5, 1.0e-3]}}")
    name, arguments = next(iter(sampler.items()))
    if name not in (*SAMPLERS, *CHOICES):
        raise ValueError(f"{where}.{name} is no sampler; there are: {', '.join((*CHOICES, *SAMPLERS))}")
    if not isinstance(arguments, list) or not arguments:
        raise ValueError(f"{where}.{name} takes a list, not {arguments!r}")
    if name in CHOICES:
        for value in arguments:
            _check_setting(key, value, where)
        return
    _check_range(where, name, arguments)
    if name not in ("randn", "qrandn"):
        low, high = _sampler_parts(sampler)[1][:2]
        for value in (low, high - 1 if "randint" in name and high - 1 >= low else high):
            _check_setting(key, value, where)


def _check_range(where: str, name: str, arguments: list[Any]) -> None:
    names = SAMPLERS[name]
    try:
        numbers = [float(value) for value in arguments if not isinstance(value, bool)]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != len(names) or len(arguments) != len(names):
        raise ValueError(f"{where}.{name} takes the numbers [{', '.join(names)}], not {arguments!r}")
    if "rand" in name and "randn" not in name and any(number != int(number) for number in numbers):
        raise ValueError(f"{where}.{name} takes whole numbers, not {arguments!r}")
    if names[0] == "lower" and numbers[0] >= numbers[1]:
        raise ValueError(f"{where}.{name}: lower {numbers[0]:g} must be below upper {numbers[1]:g}")
    if "log" in name and numbers[0] <= 0:
        raise ValueError(f"{where}.{name}: lower must be above 0")
    if names[-1] == "q" and numbers[-1] <= 0:
        raise ValueError(f"{where}.{name}: q must be above 0")


def _sampler_parts(sampler: dict[str, Any]) -> tuple[str, list[Any]]:
    name, arguments = next(iter(sampler.items()))
    if name in CHOICES:
        return name, list(arguments)
    to_number = int if "rand" in name and "randn" not in name else float
    return name, [to_number(float(value)) for value in arguments]


def _check_setting(key: str, value: Any, where: str) -> None:
    try:
        TrialSettings.model_validate({key: value})
    except ValidationError as error:
        raise ValueError(f"{where}: {value!r}: {first_problem(error)[1]}") from None


def _read_yaml(path: Path, model: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(path, f"no such file; see {model}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise InputError(
            f"{path}:line {line}", f"is not valid YAML: {error.problem or error.context}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(path, f"can't be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(path, f"must be a YAML mapping; see {model}")
    return content


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise InputError("--set", f"{override!r} must read dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError("--set", f"{override!r}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    node = content
    for parent in parents:
        if not isinstance(node.setdefault(parent, {}), dict):
            raise InputError("--set", f"{override!r}: {parent} holds no keys")
        node = node[parent]
    node[last] = value
