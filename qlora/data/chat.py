"""Owns chat prompts: from the turns of a conversation to the token ids of the base's own chat template.

A template is Jinja text that a tokenizer carries (https://huggingface.co/docs/transformers/chat_templating).
It is rendered and tokenised whole, as `tokenizer.apply_chat_template` does, so that a model sees in training
what it sees when it is served. What the assistant says is scored, the token that ends its turn included:
where that begins and ends is found in the rendered text, and a template that hides it is refused. Greetings
with nothing of their conversation before them, and turns that are not to be learned, stand there unscored.

Refuses to know models and files.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from qlora.config import Settings
from qlora.data.row_shapes import Example, Turn

_THOUGHTS_END = "</think>"


class ChatSettings(Settings):
    """Settings of a chat prompt.

    loss: score `all` of the assistant's turns, or the `last`. thinking: what templates know as
    `enable_thinking`; None leaves it to the template.
    """

    loss: Literal["all", "last"] = "all"
    thinking: bool | None = None


@dataclass(frozen=True)
class ChatPrompt:
    """The base's own chat template, and shots, which are conversations in front of what is asked."""

    name: str
    settings: ChatSettings
    shots: tuple[Example, ...] = ()

    @property
    def digest(self) -> str:
        """Return the SHA-256 (hexadecimal) of settings and shots; the template belongs to the base."""
        shots = [[[turn.role, turn.content] for turn in _whole(shot)] for shot in self.shots]
        content = ["chat", self.settings.model_dump(), shots]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8")).hexdigest()

    def ids(self, tokenizer: Any, turns: Sequence[Turn]) -> tuple[int, ...]:
        """Return the token ids that ask for the assistant's next turn.

        Raises ValueError for turns that the template refuses.
        """
        text = _rendered(tokenizer, self._with_shots(turns), self.settings.thinking, asks=True)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
        """Return the token ids of a conversation, and the places of those that are scored.

        Raises ValueError for turns that the template refuses or hides.
        """
        turns = _whole(example)
        messages = self._with_shots(turns)
        text = _rendered(tokenizer, messages, self.settings.thinking, asks=False)
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = found["input_ids"], found["offset_mapping"]
        first = len(messages) - sum(turn.role != "system" for turn in turns)  # the others are shots'
        is_asked = turns[0].role == "system"  # else nothing of its own stands before the first turn
        own = [
            place
            for place in range(first, len(messages))
            if messages[place].role == "assistant"
            and messages[place].is_learned
            and (place > first or is_asked)
        ]
        ends = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        scored: list[int] = []
        behind = 0
        for place in own if self.settings.loss == "all" else own[-1:]:
            start = self._start(tokenizer, messages, place, text)
            end = _end(text, max(start, behind), messages[place].content)
            tokens = [n for n, (low, high) in enumerate(offsets) if high > start and low < end and high > low]
            last = tokens[-1] + 1
            while last < len(ids) and ids[last] not in ends and not text[slice(*offsets[last])].strip():
                last += 1
            scored += tokens
            if last < len(ids) and ids[last] in ends:
                scored += range(tokens[-1] + 1, last + 1)
            behind = end
        return ids, scored

    def end_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Return the token that ends the assistant's turns, if the template has one."""
        question, answer = Turn("user", "a"), "b"
        ids, scored = ChatPrompt(self.name, self.settings).encode(tokenizer, Example(0, (question,), answer))
        last = ids[scored[-1]]
        is_end = last in tokenizer.all_special_ids or last in tokenizer.added_tokens_decoder
        return (last,) if is_end else ()

    def _with_shots(self, turns: Sequence[Turn]) -> list[Turn]:
        """Put shots between the system's turn and what follows it."""
        system = [turn for turn in turns[:1] if turn.role == "system"]
        shown = [turn for shot in self.shots for turn in _whole(shot) if turn.role != "system"]
        return [*system, *shown, *turns[len(system) :]]

    def _start(self, tokenizer: Any, messages: Sequence[Turn], place: int, text: str) -> int:
        """Return where what the assistant says in a turn begins: behind the prompt that asks for it."""
        # In turns before the last, some templates leave out the thoughts that they begin the last with.
        for thinking in (self.settings.thinking, None):
            prompt = _rendered(tokenizer, messages[:place], thinking, asks=True)
            if text.startswith(prompt):
                return len(prompt)
        raise ValueError(
            f"the base's chat template renders turn {place} in another way once others follow it; "
            "use loss: last, or another prompt"
        )


def _rendered(tokenizer: Any, turns: Sequence[Turn], thinking: bool | None, *, asks: bool) -> str:
    """Render turns by a tokenizer's template. Raises ValueError for those that it refuses."""
    options = {} if thinking is None else {"enable_thinking": thinking}
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            messages, tokenize=False, add_generation_prompt=asks, **options
        )
    except TemplateError as error:
        raise ValueError(f"the base's chat template refuses this conversation: {error}") from None


def _whole(example: Example) -> list[Turn]:
    """Return the turns of a conversation with its answer, if it has one."""
    return [*example.turns, *([] if example.output is None else [Turn("assistant", example.output)])]


def _end(text: str, start: int, content: str) -> int:
    """Return where what the assistant says ends in a rendered conversation.

    Templates write it as it is, without white space around it, or without its thoughts; they put nothing
    before it but thoughts, in whose tags its own words may stand, too. Raises ValueError if it is nowhere.
    """
    for said in (content, content.strip(), content.rpartition(_THOUGHTS_END)[2].strip()):
        found = text.find(said, start) if said else -1
        while found >= 0:
            before = text[start:found].strip()
            if not before or before.endswith(_THOUGHTS_END):
                return found + len(said)
            found = text.find(said, found + 1)
    raise ValueError("the base's chat template does not hold what the assistant says as it is written")
