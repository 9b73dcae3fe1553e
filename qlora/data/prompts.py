"""Owns prompts: from a YAML template, optional shots and one instruction to prompt text and its token ids.

A template file holds `template`, with {instruction} once and, if it takes shots, {shots}. With {shots} it
also holds `shot`, the text of one shot with {number}, {instruction} and {output}. Shots are solved examples
in front of the instruction, from which a model learns the task in context (few-shot prompting,
https://arxiv.org/abs/2005.14165).

Placeholders are filled in one pass, so that braces inside data stay as they are. A prompt is always tokenised
as a whole: tokenising its parts can give other ids.

Refuses to know models.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from qlora.config import MAX_LENGTH_TOKENS, InputError, Settings, validated
from qlora.data.examples import load_examples
from qlora.data.row_shapes import AS_FOUND, Example, Id, RowShape
from qlora.data.sources import Places, joined
from qlora.files import read_yaml

PROMPT_FOLDER = Path(__file__).resolve().parents[2] / "prompts"
_ANY_INSTRUCTION = "\0"
_PLACEHOLDER = re.compile(r"\{(instruction|output|number|shots)\}")


class PromptTemplate(Settings):
    """The content of a file of prompts/."""

    description: str = ""
    template: str
    shot: str | None = None

    @model_validator(mode="after")
    def _placeholders_fit(self) -> Self:
        names = _PLACEHOLDER.findall(self.template)
        unknown = set(names) - {"instruction", "shots"}
        if names.count("instruction") != 1 or names.count("shots") > 1 or unknown:
            raise ValueError("template must hold {instruction} once, and may hold {shots} once")
        if ("shots" in names) != (self.shot is not None):
            raise ValueError("{shots} in template and the key shot belong together: give both or neither")
        in_shot = set(_PLACEHOLDER.findall(self.shot or ""))
        required = {"instruction", "output"}
        if self.shot is not None and not required <= in_shot <= required | {"number"}:
            raise ValueError("shot must hold {instruction} and {output}, and may hold {number}")
        return self


@dataclass(frozen=True)
class Prompt:
    """A template and its shots, which render any instruction."""

    name: str
    template: PromptTemplate
    shots: tuple[Example, ...] = ()

    def render(self, instruction: str) -> str:
        """Return the prompt text for one instruction."""
        shots = ""
        for number, shot in enumerate(self.shots, start=1):
            shots += _fill(
                self.template.shot or "",
                number=str(number),
                instruction=shot.instruction,
                output=shot.output or "",
            )
        return _fill(self.template.template, instruction=instruction, shots=shots)

    @property
    def digest(self) -> str:
        """Return the SHA-256 (hexadecimal) of the text around instructions, without the template's name."""
        return hashlib.sha256(self.render(_ANY_INSTRUCTION).encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class EncodedExample:
    """The token ids of one example.

    `prompt` starts with BOS if the tokenizer has one; `answer` ends with EOS unless the example was cut.
    Plain text is all answer but for what its first token is predicted from: BOS, or itself without one.
    is_cut: the answer is not whole.
    """

    id: Id
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    is_cut: bool = False

    @property
    def num_tokens(self) -> int:
        """Count the tokens of prompt and answer."""
        return len(self.prompt) + len(self.answer)


def load_prompt(
    name: str = "default", num_shots: int = 0, shots_from: Places | None = None, shape: RowShape = AS_FOUND
) -> Prompt:
    """Load the prompt of `prompts/NAME.yaml`, or of the YAML file that `name` is the path of.

    Its shots are the last `num_shots` examples of the training set `shots_from`, which are of `shape`.

    Raises InputError for an unknown or malformed template and for shots that don't fit it.
    """
    path = prompt_file(name)
    known = ", ".join(sorted(file.stem for file in PROMPT_FOLDER.glob("*.yaml")))
    content = read_yaml(path, missing=f"no prompt named {name!r}; there are: {known}")
    template = validated(path, lambda: PromptTemplate.model_validate(content))
    if template.shot is None and num_shots:
        raise InputError(
            path, "takes no shots; choose a prompt with {shots}, such as few-shot, or leave --shots out"
        )
    if template.shot is not None and not num_shots:
        raise InputError(
            path,
            "needs shots; give --shots N --shots-from FILE where a command has them, or choose another "
            "prompt",
        )
    if bool(num_shots) != (shots_from is not None):
        raise InputError(path, "--shots N and --shots-from FILE belong together; give both or neither")
    if shots_from is None:
        return Prompt(name, template)
    examples = load_examples(shots_from, shape, need_output=True)
    if len(examples) < num_shots:
        raise InputError(
            joined(shots_from), f"holds {len(examples)} examples, fewer than the {num_shots} shots asked for"
        )
    shots = tuple(examples[-num_shots:])
    for shot in shots:
        check_instruction(joined(shots_from), shot)
    return Prompt(name, template, shots)


def prompt_file(name: str) -> Path:
    """Return the path of a prompt's template: `name` is a YAML file, or the name of one in `prompts/`."""
    is_path = name.endswith((".yaml", ".yml"))
    return Path(name) if is_path else PROMPT_FOLDER / f"{name}.yaml"


def encode_prompt(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Tokenise a prompt: BOS if the tokenizer has one, then the ids of the whole text.

    No other special tokens are added.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return (*bos, *_plain_ids(tokenizer, text))


def check_instruction(where: str, example: Example) -> None:
    """Raise InputError, naming `where`, for an example that a template has no place for."""
    if not example.is_instruction:
        kind = "a conversation" if example.turns else "plain text"
        raise InputError(where, f"row {example.id!r} is {kind}, where the prompt takes one instruction")


def encode_examples(
    tokenizer: Any,
    prompt: Prompt,
    examples: Sequence[Example],
    places: Places,
    max_length_tokens: int = MAX_LENGTH_TOKENS,
) -> list[EncodedExample]:
    """Tokenise examples with answers: prompt ids, answer ids and EOS, cut at `max_length_tokens`.

    Plain text has no prompt. Raises InputError, naming `places` and the row, if the cut leaves no answer
    token to score, and for a conversation that the prompt has no place for.
    """
    encoded = []
    for number, example in enumerate(examples):
        assert example.output is not None, "load_examples(need_output=True) checks this"
        answer_ids = (*_plain_ids(tokenizer, example.output), tokenizer.eos_token_id)
        if example.turns:
            check_instruction(joined(places), example)
            prompt_ids = encode_prompt(tokenizer, prompt.render(example.instruction))
        elif tokenizer.bos_token_id is not None:
            prompt_ids = (tokenizer.bos_token_id,)
        else:
            prompt_ids, answer_ids = answer_ids[:1], answer_ids[1:]
        room = max_length_tokens - len(prompt_ids)
        if room < 1:
            raise InputError(
                f"{joined(places)}:row {number}",
                f"the prompt has {len(prompt_ids)} tokens, which leaves no answer within "
                f"{max_length_tokens}; shorten the instruction or the prompt",
            )
        is_cut = room < len(answer_ids)
        encoded.append(EncodedExample(example.id, prompt_ids, answer_ids[:room], is_cut))
    return encoded


def cut_in_words(examples: Sequence[EncodedExample]) -> str:
    """Say how many examples are cut, and where; nothing if none is."""
    cut = [example.num_tokens for example in examples if example.is_cut]
    return f"{len(cut)} cut at {max(cut)} tokens" if cut else ""


def too_long_problem(num_tokens: int, max_prompt_tokens: int) -> str | None:
    """Describe what is wrong with a prompt that leaves no room to generate; return None for one that fits."""
    if num_tokens <= max_prompt_tokens:
        return None
    return (
        f"the prompt has {num_tokens} tokens, but the model has room for {max_prompt_tokens} "
        "before the new ones; shorten it or lower --max-new-tokens"
    )


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _fill(text: str, **values: str) -> str:
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)
