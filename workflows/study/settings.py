"""Owns the settings of a study: the content of a YAML file under studies/."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from qlora.config import (
    MAX_LENGTH_TOKENS,
    MAX_SEED,
    BaseModelSettings,
    InputError,
    Number,
    Settings,
    TrialSettings,
    checked_epochs,
    parse_stages,
    validated,
)
from tuning.space import START_TIMEOUT_SECONDS, DataSettings, read_settings


class Sampling(Settings):
    """Sampling in place of beam search; see DecodingSettings."""

    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, gt=0)


class Reported(Settings):
    """Public perplexities of a report, to stand beside ours.

    base: the one it used. stages, prompts: values by stages, and by prompts, which are `zero-shot`,
    `few-shot` and `adapter`.
    """

    base: str
    stages: dict[str, float] = Field(default_factory=dict)
    prompts: dict[Literal["zero-shot", "few-shot", "adapter"], float] = Field(default_factory=dict)


class Study(Settings):
    """A study.

    stages: lineages of training; what two of them begin with alike is trained once. trial: settings of
    training but epochs. prompt: by default, what fits the data. loss, thinking: of a chat prompt, see
    ChatSettings. Texts are generated for the public examples. start_timeout: seconds that a cluster has to
    bring the first node.
    """

    base_model: BaseModelSettings = BaseModelSettings()
    data: DataSettings
    prompt: str | None = None
    loss: Literal["all", "last"] | None = None
    thinking: bool | None = None
    max_length: int = Field(MAX_LENGTH_TOKENS, ge=2)
    trial: dict[str, Any] = Field(default_factory=dict)
    stages: tuple[str, ...] = ("1+1+3", "1+1+1+1+1+1")
    shots: int = Field(3, ge=1)
    beams: tuple[int, ...] = (1, 3, 5)
    sampling: Sampling = Sampling()
    max_new_tokens: int = Field(128, ge=1)
    num_predictions: int = Field(20, ge=1)
    start_timeout: Number = Field(START_TIMEOUT_SECONDS, gt=0)
    seed: int = Field(0, ge=0, le=MAX_SEED)
    reported: Reported | None = None

    @field_validator("data")
    @classmethod
    def _data_fits(cls, data: DataSettings) -> DataSettings:
        if data.holdout is not None:
            raise ValueError("a study has no use for a holdout; take it out")
        return data

    @field_validator("stages")
    @classmethod
    def _stages_fit(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        if not stages:
            raise ValueError("give at least one lineage, such as '1+1+3'")
        for one in stages:
            checked_epochs(one)
        return stages

    @field_validator("trial")
    @classmethod
    def _trial_fits(cls, trial: dict[str, Any]) -> dict[str, Any]:
        if "epochs" in trial:
            raise ValueError("epochs come from stages; take it out")
        TrialSettings.model_validate(trial)
        return trial

    @field_validator("beams")
    @classmethod
    def _beams_fit(cls, beams: tuple[int, ...]) -> tuple[int, ...]:
        if not beams or min(beams) < 1:
            raise ValueError("needs at least one number of beams, each at least 1")
        return beams

    def nodes(self) -> list[tuple[int, ...]]:
        """List every point of every lineage, as the stages that lead to it, parents first.

        For example (1,), (1, 1), (1, 1, 3), (1, 1, 1).
        """
        found: list[tuple[int, ...]] = []
        for lineage in self.stages:
            stages = parse_stages(lineage)
            found += [stages[:end] for end in range(1, len(stages) + 1) if stages[:end] not in found]
        return found

    def settings_of(self, stages: tuple[int, ...]) -> TrialSettings:
        """Return the settings of training to a point of a lineage."""
        return TrialSettings.model_validate({"seed": self.seed, **self.trial, "epochs": name_of(stages)})


def name_of(stages: tuple[int, ...]) -> str:
    """Write stages as text: (1, 1, 3) -> "1+1+3"."""
    return "+".join(map(str, stages))


def load_study(path: str | Path, overrides: list[str]) -> Study:
    """Load the Study of a YAML file with `dotted.key=value` overrides.

    Raises InputError naming file and key.
    """
    content = read_settings(path, overrides, "studies/quick.yaml", Study)
    study = validated(path, lambda: Study.model_validate(content))
    if study.data.train_examples is not None and study.shots > study.data.train_examples:
        raise InputError(
            path, f"{study.shots} shots are more than the {study.data.train_examples} training examples"
        )
    return study
