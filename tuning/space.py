"""Owns the search space file: YAML + overrides -> one validated Space. Refuses to know how a trial trains."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from qlora.config import (
    MAX_LENGTH_TOKENS,
    MAX_SEED,
    BaseModelSettings,
    DataPlaces,
    InputError,
    Number,
    Settings,
    TrialData,
    TrialSettings,
    split_config,
    validated,
)
from qlora.data.row_shapes import Format, RowShape
from qlora.data.sources import joined
from qlora.files import read_yaml
from tuning.objective import Objective
from tuning.samplers import checked_sampler, checked_setting, sampled_values, tune_sampler
from tuning.strategy import Asha, Budget, NoEarlyStopping, OptunaSearch, PriorSearch, RandomSearch, Rounds

START_TIMEOUT_SECONDS = 900.0  # that a cluster has by default to bring the first device
STORED = "stored"  # the context of a space that was checked when its sweep began
REPORTED = ("learning_rate", "lora_r", "lora_alpha", "lora_dropout", "epochs")
# Of what a trial's examples are: how a space names it where all trials share it.
_OWN_KEYS = {"prompt": "prompt", "train_examples": "data.train_examples"}
_NAME = re.compile(r"\w[\w. -]{0,198}\w|\w", re.ASCII)
_GPU_PARTS = 10_000  # Ray counts shares of a GPU in ten thousandths
_OF_A_KIND = 0.001  # of what Ray's nodes have one of, named after their kind of GPU


def checked_name(name: str) -> str:
    """Return a name that folders, MLflow and models:/ URIs can have. Raises ValueError for any other."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} can't be a name; use up to 200 letters, digits, dots, dashes, underscores and spaces, "
            "a letter or digit first and last"
        )
    return name


class TrainingShare(Settings):
    """A share of the training set that is not trained on, to measure on."""

    fraction: Number = Field(gt=0, lt=1)
    seed: int = Field(0, ge=0, le=MAX_SEED)


class DataSettings(Settings):
    """Data sets, what their rows hold, and how many of their first examples to use (all by default).

    A set is a file, a URI or a list of them; the public one and the holdout may be shares of the training
    set. holdout: examples that nothing is chosen on. format, columns: see RowShape.
    """

    train: DataPlaces
    public: TrainingShare | DataPlaces
    holdout: TrainingShare | DataPlaces | None = None
    format: Literal["auto"] | Format = "auto"
    columns: dict[str, str] = Field(default_factory=dict)
    train_examples: int | None = Field(None, ge=1)
    public_examples: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _shape_fits(self) -> Self:
        assert self.shape, "built to be checked"
        return self

    @property
    def train_name(self) -> str:
        """Return what the training set is called."""
        return joined(self.train)

    @property
    def public_name(self) -> str:
        """Return what the public set is called."""
        return self._name(self.public)

    @property
    def holdout_name(self) -> str:
        """Return what the holdout is called; nothing if there is none."""
        return self._name(self.holdout) if self.holdout is not None else ""

    def _name(self, places: TrainingShare | DataPlaces) -> str:
        if isinstance(places, TrainingShare):
            return f"{places.fraction:g} of {self.train_name}, held out with seed {places.seed}"
        return joined(places)

    @property
    def shape(self) -> RowShape:
        """Return what rows hold."""
        return RowShape(format=self.format, columns=self.columns)


class TrialResources(Settings):
    """The resources that one trial asks Ray for: CPUs, and a share of one GPU."""

    cpu: Number = Field(1, ge=0)
    gpu: Number = Field(0, ge=0, le=1)


class Space(Settings):
    """A whole search space file. `trial` holds fixed settings, `search` a sampler for each searched one.

    `trials_per_gpu`: how many trials share a GPU and the base on it, `auto` for as many as the plan finds
    room for; it takes the place of resources_per_trial.gpu. accelerator_type: the kind of GPU that trials
    run on, as Ray calls it. start_timeout: seconds that a cluster has to bring the first device. prompt: by
    default, what fits the data. soup: whether averages of the best adapters are tried when trials have ended
    (tuning.soup). objective: what trials are compared by; a name stands for its settings. price_per_gpu_hour:
    in any currency; only told of (qlora.cost). loss, thinking: of a chat prompt, see ChatSettings.
    max_length: tokens of an example, prompt and answer, behind which it is cut.
    """

    base_model: BaseModelSettings = BaseModelSettings()
    data: DataSettings
    prompt: str | None = None
    loss: Literal["all", "last"] | None = None
    thinking: bool | None = None
    max_length: int = Field(MAX_LENGTH_TOKENS, ge=2)
    trial: dict[str, Any] = Field(default_factory=dict)
    search: dict[str, dict[str, Any]]
    num_samples: int = Field(8, ge=1)
    objective: Objective = Objective()
    searcher: RandomSearch | OptunaSearch | PriorSearch = Field(RandomSearch(), discriminator="type")
    scheduler: Asha | Rounds | NoEarlyStopping = Field(Asha(), discriminator="type")
    resources_per_trial: TrialResources = TrialResources()
    trials_per_gpu: Literal["auto"] | Annotated[int, Field(ge=1)] | None = None
    accelerator_type: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+$")
    start_timeout: Number = Field(START_TIMEOUT_SECONDS, gt=0)
    max_concurrent_trials: int | None = Field(None, ge=1)
    max_failures: int = Field(2, ge=0)
    budget_tokens: int | None = Field(None, ge=1, le=65536)
    registered_model: str | None = None
    storage: str | None = None
    budget: Budget | None = None
    price_per_gpu_hour: Number | None = Field(None, gt=0)
    soup: bool = True
    seed: int = Field(42, ge=0, le=MAX_SEED)

    @field_validator("objective", mode="before")
    @classmethod
    def _name_alone(cls, objective: Any) -> Any:
        return {"name": objective} if isinstance(objective, str) else objective

    @field_validator("trials_per_gpu", mode="before")
    @classmethod
    def _count_fits(cls, count: Any) -> Any:
        if count in ("auto", None) or (str(count).isdigit() and int(count) > 0):
            return count
        raise ValueError(f"must be auto or a whole number of at least 1, not {count!r}")

    @field_validator("registered_model")
    @classmethod
    def _name_fits(cls, name: str | None) -> str | None:
        return name if name is None else checked_name(name)

    @field_validator("search")
    @classmethod
    def _samplers_fit(
        cls, search: dict[str, dict[str, Any]], info: ValidationInfo
    ) -> dict[str, dict[str, Any]]:
        if info.context == STORED:
            return search
        if not search:
            raise ValueError("search is empty; give at least one setting a sampler")
        return {key: checked_sampler(key, sampler) for key, sampler in search.items()}

    @field_validator("trial")
    @classmethod
    def _settings_fit(cls, trial: dict[str, Any]) -> dict[str, Any]:
        for key, owner in _OWN_KEYS.items():
            if key in trial:
                raise ValueError(f"{key} is no setting of training; where trials share it, it is {owner}")
        return {key: checked_setting(key, value, f"trial.{key}") for key, value in trial.items()}

    @model_validator(mode="after")
    def _trial_fits(self) -> Self:
        both = sorted(set(self.trial) & set(self.search))
        if both:
            raise ValueError(f"{', '.join(both)} stands under both trial and search; keep one")
        fixed = {"prompt": self.prompt, "train_examples": self.data.train_examples}
        for key, owner in _OWN_KEYS.items():
            if key in self.search and fixed[key] is not None:
                raise ValueError(f"{key} stands under search, and as {owner}; keep one")
        has_grid = any("grid_search" in sampler for sampler in self.search.values())
        if self.searcher.type != "random" and has_grid:
            problem = f"searcher {self.searcher.type} takes no grid_search"
            raise ValueError(f"{problem}; use choice, or the random searcher")
        rounds, most = self.scheduler, self.max_concurrent_trials
        if isinstance(rounds, Rounds) and most is not None and most < rounds.trials:
            problem = f"max_concurrent_trials {most} is below scheduler.trials {rounds.trials}"
            raise ValueError(f"{problem}: the trials of a round wait for each other")
        if self.budget is not None and self.budget.gpu_seconds is not None and not self.wants_gpu:
            raise ValueError("budget.gpu_seconds: trials ask for no GPU; give budget.minutes")
        if self.accelerator_type and not self.wants_gpu:
            raise ValueError("accelerator_type is a kind of GPU, but trials ask for none; set trials_per_gpu")
        return self

    def trial_settings(self, config: Mapping[str, Any]) -> TrialSettings:
        """Return the full settings of one sampled configuration."""
        return TrialSettings.model_validate({**self.trial, **split_config(config)[0]})

    def trial_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return one sampled configuration in full: settings, and what is searched of a trial's examples."""
        of_data = TrialData.model_validate(split_config(config)[1])
        return {
            **self.trial_settings(config).model_dump(mode="json"),
            **of_data.model_dump(mode="json", exclude_unset=True),
        }

    def values(self, key: str) -> list[Any]:
        """Return the choices, or both extremes, of a setting; the fixed one if it is not searched."""
        if key in self.search:
            return sampled_values(self.search[key])
        return [getattr(self.trial_settings({}), key)]

    @property
    def prompts(self) -> list[str | None]:
        """Return the names of the prompts that trials may have; None for what fits the data."""
        return list(dict.fromkeys(self.values("prompt"))) if "prompt" in self.search else [self.prompt]

    @property
    def wants_gpu(self) -> bool:
        """Tell whether a trial asks for a GPU or a share of one."""
        return self.trials_per_gpu is not None or self.resources_per_trial.gpu > 0

    @property
    def num_trials(self) -> int:
        """Count the trials: num_samples times the size of the grid."""
        total = self.num_samples
        for sampler in self.search.values():
            total *= len(sampler.get("grid_search", [None]))
        return total

    def trial_shares(self, side_by_side: int = 1) -> dict[str, float]:
        """Return what a trial asks Ray for: its CPUs, and its share of a GPU.

        The share follows `trials_per_gpu` if that is given. `side_by_side`: trials of a GPU where the space
        leaves that to the plan.
        """
        gpu = self.resources_per_trial.gpu
        if self.trials_per_gpu is not None:
            trials = self.trials_per_gpu if isinstance(self.trials_per_gpu, int) else side_by_side
            gpu = math.floor(_GPU_PARTS / trials) / _GPU_PARTS
        of_kind = {f"accelerator_type:{self.accelerator_type}": _OF_A_KIND} if self.accelerator_type else {}
        return {"CPU": self.resources_per_trial.cpu, "GPU": gpu, **of_kind}


def load_space(path: str | Path, overrides: list[str], fixed: dict[str, Any] | None = None) -> Space:
    """Load the Space of a YAML file with `dotted.key=value` overrides, values read as YAML.

    `fixed`: trial settings that hold whatever the file says of them. Raises InputError naming file and key.
    """
    content = read_settings(path, overrides, "search_spaces/quickstart.yaml", Space)
    for key, value in (fixed or {}).items():
        if isinstance(content.get("search"), dict):
            content["search"].pop(key, None)
        _override(content, f"trial.{key}={json.dumps(value)}")
    return validated(path, lambda: Space.model_validate(content))


def read_settings(
    path: str | Path, overrides: list[str], model: str, settings: type[Settings]
) -> dict[str, Any]:
    """Read the mapping of a YAML file with `dotted.key=value` overrides, values read as YAML.

    A part of `settings` that has defaults is left out if it is null, as it is when all of its keys are
    commented out. Raises InputError naming file and key, and `model`, a file to learn from.
    """
    content = read_yaml(Path(path).expanduser(), missing=f"no such file; see {model}")
    for name, field in settings.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        if name in content and content[name] is None and isinstance(default, Settings | dict):
            del content[name]
    for override in overrides:
        _override(content, override)
    return content


def tune_space(space: Space) -> dict[str, Any]:
    """Return the search part as Ray Tune's param_space."""
    return {key: tune_sampler(sampler) for key, sampler in space.search.items()}


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
