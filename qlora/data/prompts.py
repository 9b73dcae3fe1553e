"""Owns prompts: a YAML template, optional shots, one instruction -> prompt text -> token ids.

A template file holds `template` (with {instruction} once, and {shots} if it takes shots) and, with {shots}, `shot`, the
text of one shot with {number}, {instruction} and {output}. Placeholders are filled in one pass, so braces inside data stay
as they are. A prompt is always tokenised whole: tokenising parts can give other ids than the whole.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import model_validator

from qlora.config import MAX_LENGTH_TOKENS, InputError, Settings, validated
from qlora.data.examples import Example, load_examples

PROMPT_FOLDER = Path(__file__).resolve().parents[2] / "prompts"
_PLACEHOLDER = re.compile(r"\{(instruction|output|number|shots)\}")


class PromptTemplate(Settings):
    """What a file of prompts/ holds."""

    description: str = ""
    template: str
    shot: str | None = None

    @model_validator(mode="after")
    def _placeholders_fit(self) -> Self:
        names = _PLACEHOLDER.findall(self.template)
        if (
            names.count("instruction") != 1
            or set(names) - {"instruction", "shots"}
            or names.count("shots") > 1
        ):
            raise ValueError("template must hold {instruction} once, and may hold {shots} once")
        if ("shots" in names) != (self.shot is not None):
            raise ValueError("{shots} in template and the key shot belong together: give both or neither")
        in_shot = set(_PLACEHOLDER.findall(self.shot or ""))
        if self.shot is not None and not {"instruction", "output"} <= in_shot <= {
            "number",
            "instruction",
            "output",
        }:
            raise ValueError("shot must hold {instruction} and {output}, and may hold {number}")
        return self


@dataclass(frozen=True)
class Prompt:
    """A template with its shots filled in: renders any instruction."""

    name: str
    template: PromptTemplate
    shots: tuple[Example, ...] = ()

    def render(self, instruction: str) -> str:
        """The prompt text for one instruction."""
        numbered = enumerate(self.shots, start=1)
        shots = "".join(
            _fill(self.template.shot or "", number=str(n), instruction=s.instruction, output=s.output or "")
            for n, s in numbered
        )
        return _fill(self.template.template, instruction=instruction, shots=shots)


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example: `prompt` starts with BOS if the tokenizer has one, `answer` ends with EOS (before the cut)."""

    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Prompt and answer tokens together."""
        return len(self.prompt) + len(self.answer)


def load_prompt(name: str = "default", num_shots: int = 0, shots_from: str | Path | None = None) -> Prompt:
    """The prompt of `prompts/NAME.yaml` (or of a YAML file), with the last `num_shots` examples of a training file.

    Raises InputError for an unknown or malformed template and for shots that don't fit it.
    """
    path = prompt_file(name)
    template = validated(path, lambda: PromptTemplate.model_validate(_read_yaml(path, name)))
    if template.shot is None and num_shots:
        raise InputError(
            path, "takes no shots; choose a prompt with {shots}, such as few-shot, or leave --shots out"
        )
    if template.shot is not None and not num_shots:
        raise InputError(path, "needs shots; give --shots N --shots-from FILE")
    if bool(num_shots) != (shots_from is not None):
        raise InputError(path, "--shots N and --shots-from FILE belong together; give both or neither")
    if shots_from is None:
        return Prompt(name, template)
    examples = load_examples(shots_from, need_output=True)
    if len(examples) < num_shots:
        raise InputError(
            shots_from, f"holds {len(examples)} examples, fewer than the {num_shots} shots asked for"
        )
    return Prompt(name, template, tuple(examples[-num_shots:]))


def prompt_file(name: str) -> Path:
    """Where a prompt's template is: a YAML file, or the name of one in `prompts/`."""
    return Path(name) if name.endswith((".yaml", ".yml")) else PROMPT_FOLDER / f"{name}.yaml"


def encode_prompt(tokenizer: Any, text: str) -> tuple[int, ...]:
    """[BOS if the tokenizer has one] + ids of the whole text, without other special tokens."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return (*bos, *_plain_ids(tokenizer, text))


def encode_examples(
    tokenizer: Any,
    prompt: Prompt,
    examples: list[Example],
    source: object,
    max_length_tokens: int = MAX_LENGTH_TOKENS,
) -> list[EncodedExample]:
    """Examples with answers as token ids: prompt ids + answer ids + EOS, cut at `max_length_tokens`.

    Raises InputError (naming `source` and the row) if the cut leaves no answer token to score.
    """
    encoded = []
    for number, example in enumerate(examples):
        assert example.output is not None, "load_examples(need_output=True) checks this"
        prompt_ids = encode_prompt(tokenizer, prompt.render(example.instruction))
        answer_ids = (*_plain_ids(tokenizer, example.output), tokenizer.eos_token_id)
        room = max_length_tokens - len(prompt_ids)
        if room < 1:
            raise InputError(
                f"{source}:row {number}",
                f"the prompt has {len(prompt_ids)} tokens, which leaves no answer within "
                f"{max_length_tokens}; shorten the instruction or the prompt",
            )
        encoded.append(EncodedExample(example.id, prompt_ids, answer_ids[:room]))
    return encoded


def encode_prompts(
    tokenizer: Any, prompt: Prompt, examples: list[Example], max_prompt_tokens: int, source: object
) -> list[tuple[int, ...]]:
    """Prompts as token ids, to generate from. Raises InputError (naming `source` and the row) for one over the maximum."""
    encoded = [encode_prompt(tokenizer, prompt.render(example.instruction)) for example in examples]
    for number, tokens in enumerate(encoded):
        if len(tokens) > max_prompt_tokens:
            raise InputError(
                f"{source}:row {number}",
                f"the prompt has {len(tokens)} tokens, but the model has room for "
                f"{max_prompt_tokens} before the new ones; shorten it or lower --max-new-tokens",
            )
    return encoded


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _fill(text: str, **values: str) -> str:
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)


def _read_yaml(path: Path, name: str) -> Any:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in PROMPT_FOLDER.glob("*.yaml")))
        raise InputError(path, f"no prompt named {name!r}; there are: {known}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(path, f"is not readable YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(path, "must be a YAML mapping with the key template")
    return content
