"""Owns which model a command works with: a base, an adapter of a folder or of the registry, and its prompt.

A registered version knows how it is served: base, quantisation and prompt are the version's own unless an
option says otherwise, and what an option overrides is told.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora.base.reference import base_weights_digest, split_revision
from qlora.config import MAX_LENGTH_TOKENS, BaseModelSettings, InputError, validated
from qlora.data.prompts import AnyPrompt, for_chat, load_prompt
from qlora.data.row_shapes import AS_FOUND, Example, RowShape
from qlora.data.split import count_asked, read_keys
from qlora.files import read_json
from qlora.lora.peft_folder import adapter_base, check_adapter, check_finite
from tracking.registry import RegisteredAdapter, fetch_adapter, is_model_uri


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter as a command names it: its PEFT folder here, and its version if it is registered."""

    folder: Path
    registered: RegisteredAdapter | None

    @property
    def base(self) -> str:
        """Return the BASE that it was trained on. Raises InputError if nothing names one."""
        if self.registered and self.registered.base_model:
            return self.registered.base_model
        return adapter_base(self.folder)


@dataclass(frozen=True)
class ModelOptions:
    """The options of a command line that name a model; None where it says nothing.

    shape: what the rows of `shots_from` hold. holds_conversations: the data that the model is used on do.
    loss, thinking: see ChatSettings.
    """

    adapter: str | None = None
    base_model: str | None = None
    quantization: str | None = None
    dtype: str | None = None
    prompt: str | None = None
    shots: int = 0
    shots_from: str | None = None
    shape: RowShape = AS_FOUND
    holds_conversations: bool = False
    loss: str | None = None
    thinking: bool | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class ModelChoice:
    """The model to work with.

    max_length: tokens where examples are cut to be scored, unless the base's context is shorter. overridden:
    a line for each thing that an option has in place of the version's own.
    """

    base: BaseModelSettings
    adapter: NamedAdapter | None
    prompt: AnyPrompt
    max_length: int
    overridden: tuple[str, ...]

    @property
    def adapter_folder(self) -> str | None:
        """Return where the adapter is, if there is one."""
        return str(self.adapter.folder) if self.adapter else None

    @property
    def registered(self) -> RegisteredAdapter | None:
        """Return the version of the registry, if that is what was named."""
        return self.adapter.registered if self.adapter else None


def trained_on_in_words(choice: ModelChoice, examples: Iterable[Example], num_examples: int) -> str:
    """Say how many examples ask what a registered adapter was trained on; nothing if none does."""
    if choice.registered is None or choice.registered.trained_on is None:
        return ""
    known = count_asked(examples, read_keys(choice.registered.trained_on))
    return f"{known} of {num_examples} rows ask what the adapter was trained on" if known else ""


def reading_in_words(choice: ModelChoice, tokenizer: Any) -> str:
    """Say that a base is no longer what a registered adapter was trained on; else nothing.

    That is told by its weights, its tokenizer and its chat template.
    """
    from qlora.base.model import template_digest, tokenizer_digest

    if (version := choice.registered) is None:
        return ""
    tags = version.tags
    now = {
        "weights": lambda: base_weights_digest(choice.base.name) or tags.get("weights_digest"),
        "tokenizer": lambda: tokenizer_digest(tokenizer),
        "chat template": lambda: template_digest(tokenizer),
    }
    before = {what: tags.get(f"{what.split()[-1]}_digest") for what in now}
    changed = [what for what, digest in before.items() if digest not in (None, now[what]())]
    if not changed:
        return ""
    parts = " and the ".join(changed)
    return f"the {parts} of {choice.base.name} changed since {version.model_uri} was trained"


def find_adapter(adapter: str) -> NamedAdapter:
    """Find a PEFT folder or a models:/ URI, fetched if need be; checked, not loaded. Raises InputError."""
    registered = fetch_adapter(adapter) if is_model_uri(adapter) else None
    folder = registered.folder if registered else Path(adapter).expanduser().resolve()
    check_adapter(folder)
    check_finite(folder)
    return NamedAdapter(folder, registered)


def choose_model(options: ModelOptions) -> ModelChoice:
    """Choose base, adapter and prompt. Raises InputError for what can't be had or does not fit."""
    adapter = find_adapter(options.adapter) if options.adapter else None
    version = adapter.registered if adapter else None
    base = _base_settings(options, adapter)
    prompt = _prompt(options, version)
    overridden = []
    if version is None and adapter is not None and (own_base := _other_base(adapter, base.name)):
        overridden.append(f"base model {base.name}, in place of {own_base}, which {options.adapter} names")
    if version is None and adapter is not None:
        overridden += _unlike_its_sweep(adapter.folder, base, prompt)
    if version is not None:
        served, digest = f"which {version.model_uri} is served with", version.tags.get("prompt_digest")
        own = {
            "base model": (version.base_model, options.base_model),
            "quantization": (version.quantization, options.quantization),
            "max length": (
                version.tags.get("max_length"),
                None if options.max_length is None else str(options.max_length),
            ),
        }
        for name, (registered, asked) in own.items():
            if asked is not None and registered is not None and asked != registered:
                overridden.append(f"{name} {asked}, in place of {registered}, {served}")
        named, asked = version.tags.get("prompt"), _asked_prompt(options, version)
        if asked is not None and named is not None:
            if asked != named and prompt.digest != digest:
                overridden.append(f"prompt {asked}, in place of {named}, {served}")
            elif digest is not None and prompt.digest != digest:
                overridden.append(f"prompt {asked} as it reads now, in place of its text {served}")
    own_length = version.tags.get("max_length", "") if version is not None else ""
    max_length = options.max_length or (int(own_length) if own_length.isdecimal() else MAX_LENGTH_TOKENS)
    return ModelChoice(base, adapter, prompt, max_length, tuple(overridden))


def _unlike_its_sweep(folder: Path, base: BaseModelSettings, prompt: AnyPrompt) -> list[str]:
    """Say what is otherwise than in the sweep whose best adapter a folder is; nothing of another folder."""
    sweep, words = folder.parent, []
    if folder.name != "best" or not (sweep / "sweep.json").is_file():
        return []
    try:
        own = read_json(sweep / "sweep.json", "")["space"]["base_model"]["quantization"]
        trained_with = load_prompt(str(sweep / "prompt.yaml"))
    except (InputError, OSError, LookupError, TypeError):
        return []  # nothing that is asked for here needs them
    if own != base.quantization:
        words.append(f"quantization {base.quantization}, in place of {own}, which the sweep {sweep.name} has")
    if trained_with.digest != prompt.digest:
        mine = f"the prompt of the sweep {sweep.name} ({sweep / 'prompt.yaml'})"
        words.append(f"prompt {prompt.name}, in place of {mine}")
    return words


def _other_base(adapter: NamedAdapter, name: str) -> str | None:
    """Return the base that an adapter names, if that is another; None if it names none."""
    try:
        own = adapter.base
    except InputError:
        return None
    if split_revision(own)[0] == name:  # which names no commit
        return None
    places = {Path(one).expanduser().resolve() for one in (own, name)}
    return own if len(places) > 1 else None


def _base_settings(options: ModelOptions, adapter: NamedAdapter | None) -> BaseModelSettings:
    name = options.base_model or (adapter.base if adapter else None)
    if name is None:
        raise InputError("--base-model", "is missing; name a base, or an adapter that says its own")
    registered = adapter.registered if adapter else None
    content = {
        "name": name,
        "quantization": options.quantization or (registered and registered.quantization) or "nf4",
        "dtype": options.dtype or "auto",
    }
    return validated("--base-model", lambda: BaseModelSettings.model_validate(content))


def _prompt(options: ModelOptions, version: RegisteredAdapter | None) -> AnyPrompt:
    asked = _asked_prompt(options, version)
    if asked is None and version is not None and version.prompt is not None:
        prompt = load_prompt(str(version.prompt), options.shots, options.shots_from, options.shape)
        prompt = replace(prompt, name=version.tags.get("prompt", version.prompt.stem))
    else:
        prompt = load_prompt(asked or "default", options.shots, options.shots_from, options.shape)
    return for_chat(prompt, "--prompt", options.loss, options.thinking)


def _asked_prompt(options: ModelOptions, version: RegisteredAdapter | None) -> str | None:
    """Return the prompt that the options ask for: one that is named or, for shots alone, `few-shot`.

    Conversations and a version that was trained on them bring `chat`, which takes shots too.
    """
    is_chat = options.holds_conversations and (version is None or version.prompt is None)
    if options.prompt or is_chat:
        return options.prompt or "chat"
    own_takes_shots = version is not None and version.tags.get("prompt_kind") == "chat"
    return "few-shot" if options.shots and not own_takes_shots else None
