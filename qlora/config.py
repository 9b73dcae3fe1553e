"""Owns the typed settings and the one error that users see.

Settings are pydantic models (https://docs.pydantic.dev). Every settings class is frozen and forbids unknown
keys: a misspelt key is an error, never a silent default. The defaults of `TrialSettings` are a complete
training recipe, so this file is also where to see which hyperparameters there are.

Refuses to know torch, Ray and MLflow, so that it imports at once.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

T = TypeVar("T")
DEFAULT_BASE = "smollm2-135m-instruct"
MAX_LENGTH_TOKENS = 2048
MAX_SEED = 2**32 - 1  # what NumPy's and every other generator takes
MAX_RANK = 1024
MAX_EPOCHS = 10_000  # of a schedule; a plan lays out each


def printable(text: str) -> str:
    """Return a text with escapes in place of what does not print: line ends, a terminal's commands."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


# What settings are called by Hugging Face's Trainer and TRL, LLaMA-Factory, Axolotl and Unsloth.
_BATCH = "trial.batch_size, the examples of a step; how many go through together is planned"
_OTHER_NAMES = {
    **dict.fromkeys(
        ("gradient_accumulation_steps", "per_device_train_batch_size", "micro_batch_size"), _BATCH
    ),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), "trial.warmup_fraction, a share of the steps"),
    **dict.fromkeys(
        ("num_train_epochs", "num_epochs", "max_steps"), "trial.epochs, a number or stages such as 1+1+3"
    ),
    **dict.fromkeys(("cutoff_len", "max_seq_length", "sequence_len", "model_max_length"), "max_length"),
    **dict.fromkeys(("optim", "optimizer"), "AdamW, and no setting"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), "trial.schedule"),
    **dict.fromkeys(("model_name_or_path", "model", "model_id"), "base_model.name"),
    **dict.fromkeys(("load_in_4bit", "quantization_bit", "adapter"), "base_model.quantization"),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype"), "base_model.dtype"),
    **dict.fromkeys(("lr", "learning_rates"), "learning_rate"),
    **dict.fromkeys(("lora_rank", "rank", "r"), "lora_r"),
    **dict.fromkeys(("lora_target", "lora_target_modules"), "trial.target_modules"),
    **dict.fromkeys(("dataset", "datasets", "train_file", "data_path"), "data.train"),
    **dict.fromkeys(("val_set_size", "val_size", "test_size"), "data.public: {fraction: F}"),
    **dict.fromkeys(("eval_dataset", "validation_file"), "data.public"),
    **dict.fromkeys(("template", "chat_template"), "prompt"),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt"), "data.format: text, which scores every token"),
    **dict.fromkeys(("eval_steps", "evaluation_strategy", "eval_strategy"), "trial.evaluations_per_epoch"),
    **dict.fromkeys(("output_dir", "run_name"), "the option --name"),
    **dict.fromkeys(("gradient_checkpointing", "packing", "sample_packing"), "planned, and no setting"),
}


class InputError(ValueError):
    """Bad input or configuration, which the user can mend.

    Its text is the one line that the user sees: `<file>[:<row or key>]: <problem and mend>`.
    """

    def __init__(self, where: object, problem: str):
        super().__init__(printable(f"{where}: {' '.join(problem.split())}"))
        self.where = where
        self.problem = problem

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        """Return what pickle rebuilds the error from: its two parts.

        So it can cross from a worker to the driver.
        """
        return type(self), (str(self.where), self.problem)


class Settings(BaseModel):
    """Base class of all settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def parse_stages(epochs: int | str) -> tuple[int, ...]:
    """Return the epochs of each stage: 2 -> (2,), "1+1+3" -> (1, 1, 3).

    Raises ValueError for anything else.
    """
    parts = str(epochs).split("+")
    are_counts = all(_is_whole_number(part) and int(part) > 0 for part in parts)
    if isinstance(epochs, bool) or not are_counts:
        raise ValueError(f"epochs must be a positive integer or stages such as '1+1+3', not {epochs!r}")
    return tuple(int(part) for part in parts)


def _is_whole_number(text: str) -> bool:
    """Tell whether a text has nothing but the digits 0 to 9, apart from white space around them."""
    return text.strip().isascii() and text.strip().isdigit()


def checked_epochs(epochs: int | str) -> int | str:
    """Return epochs. Raises ValueError as `parse_stages` does, and for more than MAX_EPOCHS in all."""
    if (total := sum(parse_stages(epochs))) > MAX_EPOCHS:
        raise ValueError(f"epochs are {total} in all; {MAX_EPOCHS} are the most")
    return epochs


def _number_from_text(value: Any) -> Any:
    """Convert text to the number that was meant: YAML 1.1 reads 3e-5, which has no dot, as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _epochs_from_text(value: Any) -> Any:
    """Convert 2.0 and "2", which samplers and YAML may give, to the whole number that was meant."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and _is_whole_number(value):
        return int(value)
    return value


def _list_from_text(value: Any) -> Any:
    """Convert names in one text, with commas between them, to a list."""
    is_names = isinstance(value, str) and value != "all-linear"
    names = tuple(name.strip() for name in value.split(",")) if is_names else value
    if isinstance(names, list | tuple) and (not names or "" in names):
        raise ValueError("names no layer; name some, or all-linear")
    return names


def _expanded_home(name: Any) -> Any:
    """Expand a leading ~ to the user's home folder."""
    if isinstance(name, str) and name.startswith("~"):
        return str(Path(name).expanduser())
    return name


LocalPath = Annotated[str, BeforeValidator(_expanded_home)]
DataPlaces = LocalPath | Annotated[tuple[LocalPath, ...], Field(min_length=1)]
Number = Annotated[float, BeforeValidator(_number_from_text)]
Epochs = Annotated[int | str, BeforeValidator(_epochs_from_text), AfterValidator(checked_epochs)]
Modules = Annotated[Literal["all-linear"] | tuple[str, ...], BeforeValidator(_list_from_text)]


class BaseModelSettings(Settings):
    """Settings of the frozen base model.

    `name` is `smollm2-135m-instruct`, a local folder or a hub id `name[@revision]`.
    """

    name: LocalPath = Field(DEFAULT_BASE, min_length=1)
    quantization: Literal["nf4", "none"] = "nf4"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class TrialSettings(Settings):
    """Settings of one training run.

    The defaults are the report's: rank 64, alpha 16, dropout 0.1, learning rate 3e-5, batches of 2 x 8
    examples.
    """

    learning_rate: Number = Field(3e-5, gt=0, le=1)
    lora_r: int = Field(64, ge=1, le=MAX_RANK)
    lora_alpha: Number = Field(16, gt=0)
    lora_dropout: Number = Field(0.1, ge=0, lt=1)
    epochs: Epochs = 1
    target_modules: Modules = "all-linear"
    batch_size: int = Field(16, ge=1)
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_fraction: Number = Field(0.0, ge=0, lt=1)
    weight_decay: Number = Field(0.0, ge=0)
    max_grad_norm: Number = Field(1.0, gt=0)
    evaluations_per_epoch: int = Field(1, ge=1)
    seed: int = Field(0, ge=0, le=MAX_SEED)

    @property
    def stages(self) -> tuple[int, ...]:
        """Return the epochs of each stage; every stage has its own fresh optimizer and schedule."""
        return parse_stages(self.epochs)


class TrialData(Settings):
    """Settings of a trial's examples, where the trials of a sweep differ in them.

    prompt: a name or a file, as a space's. train_examples: how many of the first training examples.
    """

    prompt: LocalPath | None = Field(None, min_length=1)
    train_examples: int | None = Field(None, ge=1)


def split_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part a trial's configuration into what TrialSettings and what TrialData takes."""
    of_data = {key: value for key, value in config.items() if key in TrialData.model_fields}
    return {key: value for key, value in config.items() if key not in of_data}, of_data


class DecodingSettings(Settings):
    """Settings of text generation. What is not named here follows transformers' defaults.

    stop: texts at the first of which an output ends, without it.
    """

    num_beams: int = Field(3, ge=1)
    max_new_tokens: int = Field(128, ge=1)
    min_new_tokens: int | None = Field(None, ge=1)
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] | None = None
    do_sample: bool = False
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, gt=0)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    repetition_penalty: float | None = Field(None, gt=0)
    no_repeat_ngram_size: int | None = Field(None, ge=1)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] | None = None

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        of_sampling = ("top_p", "top_k", "temperature", "seed")
        given = [name for name in of_sampling if getattr(self, name) is not None]
        if given and not self.do_sample:
            raise ValueError(f"{', '.join(given)} needs do_sample")
        if self.min_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}"
            )
        return self


def meant_by(key: str, known: Iterable[str]) -> str:
    """Say what an unknown key may mean: what another tool's name is called here, or the nearest known one."""
    if key in _OTHER_NAMES:
        return f"here that is {_OTHER_NAMES[key]}"
    nearest = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.7)
    return f"did you mean {nearest[0]}?" if nearest else "remove it or mend its spelling"


def _all_settings(settings: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield a class of settings and all below it."""
    yield settings
    for below in settings.__subclasses__():
        yield from _all_settings(below)


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Return the dotted key and the plain words of a validation error's first problem."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = {name for settings in _all_settings(Settings) for name in settings.model_fields}
        return key, f"unknown key; {meant_by(str(problem['loc'][-1]), known)}"
    return key, problem["msg"].removeprefix("Value error, ")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, with its type where that is a word alone.

    A line that ends in a colon is a heading: the next one comes with it.
    """
    text = str(error).strip()
    first, *others = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    heading = f"{first} {others[0]}" if first.endswith(":") and others else first
    return heading if " " in text else repr(error)


def validated(where: object, build: Callable[[], T]) -> T:
    """Run `build` and return its result.

    Raises InputError, naming file and key, for pydantic's ValidationError.
    """
    try:
        return build()
    except ValidationError as error:
        key, problem = first_problem(error)
        raise InputError(f"{where}:{key}" if key else where, problem) from error
