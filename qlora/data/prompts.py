"""Owns prompts: from a YAML template, optional shots and one instruction to prompt text and its token ids.

A template file holds `template`, with {instruction} once and, if it takes shots, {shots}. With {shots} it
also holds `shot`, the text of one shot with {number}, {instruction} and {output}. Shots are solved examples
in front of the instruction, from which a model learns the task in context (few-shot prompting,
https://arxiv.org/abs/2005.14165).

Placeholders are filled in one pass, so that braces inside data stay as they are. A prompt is always tokenised
as a whole: tokenising its parts can give other ids. A file that holds `chat` in place of `template` means the
base's own chat template (qlora.data.chat).

Refuses to know models.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import model_validator

from qlora.config import MAX_LENGTH_TOKENS, InputError, Settings, validated
from qlora.data.chat import ChatPrompt, ChatSettings
from qlora.data.examples import load_examples
from qlora.data.row_shapes import AS_FOUND, Example, Id, RowShape, Turn
from qlora.data.sources import Places, joined
from qlora.files import read_yaml

_USE_CHAT = "prompt: chat takes whole conversations"
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


class _ChatFile(Settings):
    """The content of a file that stands for the base's own chat template."""

    description: str = ""
    chat: ChatSettings


@dataclass(frozen=True)
class Prompt:
    """A template and its shots, which render any instruction. text: of the template's file, as it was."""

    name: str
    template: PromptTemplate
    shots: tuple[Example, ...] = ()
    text: str = ""

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

    def ids(self, tokenizer: Any, turns: Sequence[Turn]) -> tuple[int, ...]:
        """Return the token ids that ask for an answer: BOS if the tokenizer has one, then the whole text's.

        Raises ValueError for a conversation, which a template has no place for.
        """
        return encode_prompt(tokenizer, self.render(_instruction_of(turns)))

    def encode(self, tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
        """Return the token ids of prompt, answer and EOS, and the places of those that are scored.

        Raises ValueError as `ids` does.
        """
        asked = self.ids(tokenizer, example.turns)
        answer = [*_plain_ids(tokenizer, example.output or ""), tokenizer.eos_token_id]
        return [*asked, *answer], list(range(len(asked), len(asked) + len(answer)))

    def end_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Return the token that ends answers."""
        return (tokenizer.eos_token_id,)

    @property
    def digest(self) -> str:
        """Return the SHA-256 (hexadecimal) of the text around instructions, without the template's name."""
        return hashlib.sha256(self.render(_ANY_INSTRUCTION).encode("utf-8")).hexdigest()


AnyPrompt = Prompt | ChatPrompt


@dataclass(frozen=True)
class EncodedExample:
    """The token ids of one example.

    prompt: what stands before the first scored token, with BOS if the tokenizer has one. answer: all behind
    it, with EOS unless the example was cut. scored: places in `answer` that are scored, all of them if None;
    a conversation has others between them. is_cut: the answer is not whole.
    """

    id: Id
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    is_cut: bool = False
    scored: tuple[int, ...] | None = None

    @property
    def num_scored(self) -> int:
        """Count the scored tokens."""
        return len(self.answer) if self.scored is None else len(self.scored)

    @property
    def num_tokens(self) -> int:
        """Count the tokens of prompt and answer."""
        return len(self.prompt) + len(self.answer)


def load_prompt(
    name: str = "default", num_shots: int = 0, shots_from: Places | None = None, shape: RowShape = AS_FOUND
) -> AnyPrompt:
    """Load the prompt of `prompts/NAME.yaml`, or of the YAML file that `name` is the path of.

    Its shots are the last `num_shots` examples of the training set `shots_from`, which are of `shape`.

    Raises InputError for an unknown or malformed template and for shots that don't fit it.
    """
    path = prompt_file(name)
    known = ", ".join(sorted(file.stem for file in PROMPT_FOLDER.glob("*.yaml")))
    content = read_yaml(path, missing=f"no prompt named {name!r}; there are: {known}")
    text = path.read_text(encoding="utf-8")
    if bool(num_shots) != (shots_from is not None):
        raise InputError(path, "--shots N and --shots-from FILE belong together; give both or neither")
    shots = _load_shots(num_shots, shots_from, shape) if shots_from is not None else ()
    if "chat" in content:
        chat = validated(path, lambda: _ChatFile.model_validate(content)).chat
        return ChatPrompt(name, chat, shots)
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
    for shot in shots:
        try:
            _instruction_of(shot.turns)
        except ValueError as error:
            raise InputError(joined(shots_from or ""), f"row {shot.id!r} can be no shot: {error}") from None
    return Prompt(name, template, shots, text)


def _load_shots(num_shots: int, shots_from: Places, shape: RowShape) -> tuple[Example, ...]:
    """Load the last examples of a training set. Raises InputError if it has fewer."""
    examples = load_examples(shots_from, shape, need_output=True)
    if len(examples) < num_shots:
        problem = f"holds {len(examples)} examples, fewer than the {num_shots} shots asked for"
        raise InputError(joined(shots_from), problem)
    return tuple(examples[-num_shots:])


def for_chat(prompt: AnyPrompt, where: str, loss: str | None, thinking: bool | None) -> AnyPrompt:
    """Return a prompt with settings of a chat in place of its own, where they are given.

    Raises InputError, naming `where`, if it is a template, which has none.
    """
    asked = {"loss": loss, "thinking": thinking}
    given = {name: value for name, value in asked.items() if value is not None}
    if not given:
        return prompt
    if isinstance(prompt, Prompt):
        raise InputError(where, f"{' and '.join(given)} needs prompt: chat; {prompt.name} is a template")
    return replace(prompt, settings=ChatSettings(**{**prompt.settings.model_dump(), **given}))


def check_chat(prompt: AnyPrompt, tokenizer: Any, base: str) -> None:
    """Raise InputError, naming the base, if a prompt needs a chat template and the tokenizer has none."""
    if isinstance(prompt, ChatPrompt) and not (tokenizer.chat_template and tokenizer.is_fast):
        raise InputError(
            base,
            "its tokenizer has no chat template, which conversations need; choose a base that has one, or "
            "give a prompt for instructions",
        )


def prompt_text(prompt: AnyPrompt) -> str:
    """Return the text of a YAML file that the prompt can be loaded from again, without its shots."""
    if isinstance(prompt, ChatPrompt):
        content: dict[str, Any] = {"chat": prompt.settings.model_dump()}
        return yaml.safe_dump(content, allow_unicode=True)
    return prompt.text


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


def _instruction_of(turns: Sequence[Turn]) -> str:
    """Return the one instruction that turns are. Raises ValueError for others."""
    if len(turns) != 1 or turns[0].role != "user":
        kind = "a conversation" if turns else "plain text"
        raise ValueError(f"it is {kind}, where the prompt takes one instruction; {_USE_CHAT}")
    return turns[0].content


def encode_examples(
    tokenizer: Any,
    prompt: AnyPrompt,
    examples: Sequence[Example],
    places: Places,
    max_length_tokens: int = MAX_LENGTH_TOKENS,
    reason: str = "",
) -> list[EncodedExample]:
    """Tokenise examples with answers under a prompt, cut at `max_length_tokens`; `reason` says why there.

    Plain text has no prompt: all of it is scored. Raises InputError, naming `places` and the row, if the cut
    leaves no token to score, and for a conversation that the prompt has no place for.
    """
    encoded = []
    for number, example in enumerate(examples):
        assert example.output is not None, "load_examples(need_output=True) checks this"
        where = f"{joined(places)}:row {number}"
        try:
            ids, scored = prompt.encode(tokenizer, example) if example.turns else _text(tokenizer, example)
        except ValueError as error:
            raise InputError(where, str(error)) from None
        first = scored[0]
        kept = tuple(place - first for place in scored if place < max_length_tokens)
        if not kept:
            raise InputError(
                where,
                f"the prompt has {first} tokens, which leaves no answer within {max_length_tokens}"
                f"{reason and ', ' + reason}; shorten the instruction or the prompt",
            )
        answer = tuple(ids[first:max_length_tokens])
        is_whole = kept == tuple(range(len(answer)))
        is_cut = len(ids) > max_length_tokens
        encoded.append(
            EncodedExample(example.id, tuple(ids[:first]), answer, is_cut, None if is_whole else kept)
        )
    return encoded


def _text(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    """Return the token ids of plain text, and the places of all that are predicted from others."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [*bos, *_plain_ids(tokenizer, example.output or ""), tokenizer.eos_token_id]
    return ids, list(range(1, len(ids)))


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
