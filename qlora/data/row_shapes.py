"""Owns the shapes of rows: which columns hold what, and how an example is made of them.

    instruction     instruction, output and, if there is one, input    Alpaca's
    completion      prompt, completion
    messages        messages: a list of {role, content}; system        OpenAI's
    conversations   conversations: a list of {from, value}; system     ShareGPT's
    text            text: all of it is learned, without a prompt

A shape is recognised by the columns of the first row, in this order, or named by settings. Columns that hold
none of its parts are left alone, and told; so are further values of messages, but for `weight`, which is 0 in
answers that are not to be learned, and for calls of tools, which are refused.

Sources: https://github.com/tatsu-lab/stanford_alpaca,
https://huggingface.co/docs/trl/dataset_formats
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from qlora.config import InputError, Settings
from qlora.data.json_rows import json_kind

Format = Literal["instruction", "messages", "conversations", "completion", "text"]
Id = str | int | float
Role = Literal["system", "user", "assistant"]
_ID = "id"
# The parts of a format's rows; those that every row must have come first, and tell the format.
_PARTS: dict[Format, tuple[str, ...]] = {
    "instruction": ("instruction", "output", "input"),
    "messages": ("messages", "system"),
    "conversations": ("conversations", "system"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_MESSAGE_KEYS = ("role", "from", "content", "value", "weight")
_CALLS = ("tool_calls", "function_call")
_ALPACA_INPUT = "\n\n### Input:\n"  # between an instruction and its input, as Alpaca's template has it


@dataclass(frozen=True)
class Turn:
    """One message of a conversation. is_learned: whether training scores it if it is the assistant's."""

    role: Role
    content: str
    is_learned: bool = True


@dataclass(frozen=True)
class Example:
    """One row of a data file.

    id: as it came, or the row's number. turns: what is said before the answer, a single user's turn for an
    instruction, none for plain text. output: the answer, or the plain text; None in a test file without
    answers.
    """

    id: Id
    turns: tuple[Turn, ...]
    output: str | None

    @property
    def instruction(self) -> str:
        """Return what the user says last; empty for plain text."""
        return next((turn.content for turn in reversed(self.turns) if turn.role == "user"), "")

    @property
    def is_instruction(self) -> bool:
        """Tell whether there is one user's turn and nothing else."""
        return len(self.turns) == 1 and self.turns[0].role == "user"


def instruction_example(identifier: Id, instruction: str, output: str | None = None) -> Example:
    """Return the example of an instruction and its answer."""
    return Example(identifier, (Turn("user", instruction),), output)


class RowShape(Settings):
    """Settings of what rows hold.

    format: told by the columns of the first row unless it is given. columns: the names of columns by the part
    that they hold, where they are not named after it, such as {"instruction": "question"}.
    """

    format: Literal["auto"] | Format = "auto"
    columns: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _columns_fit(self) -> Self:
        formats = get_args(Format) if self.format == "auto" else (self.format,)
        parts = {one: {*_PARTS[one], _ID} for one in formats}
        if not any(set(self.columns) <= parts[one] for one in formats):
            known = "; ".join(f"{one}: {', '.join((_ID, *_PARTS[one]))}" for one in formats)
            raise ValueError(f"columns names {', '.join(sorted(self.columns))}; parts of rows are {known}")
        return self

    def of_row(self, where: str, row: Any) -> "FoundShape":
        """Return the shape that a set has by its first row.

        Raises InputError, naming the columns that were seen, if it has none.
        """
        if not isinstance(row, Mapping):
            raise InputError(where, f"must be an object with named values, not {json_kind(row)}")
        missing = sorted(column for column in self.columns.values() if column not in row)
        if missing:
            raise InputError(where, f"has no {missing[0]!r}; {_seen(row)}")
        formats = get_args(Format) if self.format == "auto" else (self.format,)
        for one in formats:
            names = {part: self.columns.get(part, part) for part in (_ID, *_PARTS[one])}
            if set(self.columns) <= set(names) and (self.format != "auto" or names[_PARTS[one][0]] in row):
                return FoundShape(one, names).seen_with(row)
        raise InputError(
            where,
            f"is of no known shape; {_seen(row)}; name what they hold with columns, such as "
            "instruction=COLUMN and output=COLUMN",
        )


AS_FOUND = RowShape()  # by the first row alone


@dataclass(frozen=True)
class FoundShape:
    """The shape of a set's rows: a format, and the column of each of its parts.

    seen: the parts that rows were seen to have. unused: columns, and values of messages such as
    `messages.name`, that they have besides.
    """

    format: Format
    names: Mapping[str, str]
    seen: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()

    @property
    def words(self) -> str:
        """Return the parts that rows have and the columns that are not used, for people."""
        parts = " + ".join(part for part in _PARTS[self.format] if part in self.seen)
        return f"{parts}, not used: {', '.join(sorted(self.unused))}" if self.unused else parts

    def seen_with(self, row: Any) -> "FoundShape":
        """Return the shape with what one more row holds."""
        if not isinstance(row, Mapping):
            return self  # which is refused when examples are made
        seen = {part for part in _PARTS[self.format] if self.names[part] in row}
        unused = {str(column) for column in row if column not in self.names.values()}
        if self.holds_conversations:
            column = self.names[self.format]
            messages = row.get(column)
            for message in messages if isinstance(messages, list) else ():
                keys = message if isinstance(message, Mapping) else ()
                unused |= {f"{column}.{key}" for key in keys if key not in _MESSAGE_KEYS and message[key]}
        return replace(self, seen=self.seen | seen, unused=self.unused | unused)

    def has_id(self, row: Any) -> bool:
        """Tell whether a row has an id of its own."""
        return isinstance(row, Mapping) and row.get(self.names[_ID]) is not None

    @property
    def holds_conversations(self) -> bool:
        """Tell whether rows are conversations, of one turn or of several."""
        return self.format in ("messages", "conversations")

    def example(self, where: str, number: int, row: Any, need_output: bool) -> Example:
        """Make the example of a row, which is the `number`th of its set.

        Raises InputError, naming `where`, for what a row may not hold.
        """
        if not isinstance(row, Mapping):
            raise InputError(where, f"must be an object with named values, not {json_kind(row)}")
        identifier = self._identifier(where, number, row)
        if self.holds_conversations:
            turns = _turns(where, self._value(where, row, self.format))
            if not _is_blank(row.get(self.names["system"])):
                turns.insert(0, Turn("system", self._text(where, row, "system")))
            return _conversation(where, identifier, turns, need_output)
        if self.format == "text":
            if not need_output:
                raise InputError(where, "is plain text, which asks for no answer; name its instructions")
            return Example(identifier, (), self._text(where, row, "text"))
        asked, answered = _PARTS[self.format][:2]
        instruction = self._text(where, row, asked)
        if self.format == "instruction" and not _is_blank(row.get(self.names["input"])):
            instruction += _ALPACA_INPUT + self._text(where, row, "input")
        is_there = need_output or not _is_blank(row.get(self.names[answered]))
        output = self._text(where, row, answered) if is_there else None
        return instruction_example(identifier, instruction, output)

    def _identifier(self, where: str, number: int, row: Mapping[str, Any]) -> Id:
        """Return a row's id: text or a number as it came, or else the row's own number."""
        value = row.get(self.names[_ID])
        if value is None:
            return number
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(value, int | float) and is_number and math.isfinite(value):
            return value
        if not isinstance(value, str):
            kind = "no finite number" if is_number else f"not {json_kind(value)}"
            raise InputError(where, f"{self.names[_ID]} must be text or a number, {kind}")
        return checked_text(where, self.names[_ID], value)

    def _value(self, where: str, row: Mapping[str, Any], part: str) -> Any:
        """Return what the column of a part holds. Raises InputError if there is none."""
        if self.names[part] not in row:
            raise InputError(where, f"has no {self.names[part]!r}; add it")
        return row[self.names[part]]

    def _text(self, where: str, row: Mapping[str, Any], part: str) -> str:
        """Return the text of a part. Raises InputError as `checked_text` does."""
        return checked_text(where, self.names[part], self._value(where, row, part))


def checked_text(where: str, name: str, value: Any) -> str:
    """Return a value that is a text.

    Raises InputError, naming it, for any other, and for a text that is empty or can't be written as UTF-8.
    """
    if not isinstance(value, str):
        raise InputError(where, f"{name} must be text, not {json_kind(value)}")
    if not value.strip():
        raise InputError(where, f"{name} is empty; fill it or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        problem = f"{name} holds half a surrogate pair, which is no character; mend the text"
        raise InputError(where, problem) from None
    return value


def _is_blank(value: Any) -> bool:
    """Tell whether a value stands for nothing: null, or text without a character that is seen."""
    return value is None or (isinstance(value, str) and not value.strip())


def _conversation(where: str, identifier: Id, turns: list[Turn], need_output: bool) -> Example:
    """Make the example of a conversation: its last answer, and all turns before it.

    A conversation that ends with the user's turn is asked for its answer, unless answers are needed: then
    what stands behind the last answer is left out. Raises InputError for turns out of place.
    """
    if any(turn.role == "system" for turn in turns[1:]):
        raise InputError(where, "has a system message that is not the first; mend the conversation")
    if not need_output:
        turns = [replace(turn, is_learned=True) for turn in turns]
    said = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    answers = [number for number in said if turns[number].is_learned]
    if need_output and not answers:
        which = "; its weights are all 0" if said else ""
        raise InputError(where, f"has no message of the assistant{which}; add it or remove the row")
    last = answers[-1] if answers and (need_output or answers[-1] == len(turns) - 1) else len(turns)
    if not any(turn.role == "user" for turn in turns[:last]):
        raise InputError(where, "has no message of the user before the answer; add it or remove the row")
    return Example(identifier, tuple(turns[:last]), turns[last].content if last < len(turns) else None)


def _turns(where: str, value: Any) -> list[Turn]:
    """Make the turns of a list of messages; a system message that says nothing is none."""
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else json_kind(value)
        raise InputError(where, f"a conversation must be a list of messages, not {kind}")
    turns = [_turn(where, number, message) for number, message in enumerate(value)]
    return [turn for turn in turns if turn.content or turn.role != "system"]


def _turn(where: str, number: int, message: Any) -> Turn:
    """Make a turn of a message, whichever of both ways it is written in."""
    name = f"message {number}"
    if not isinstance(message, Mapping):
        raise InputError(where, f"{name} must be an object with role and content, not {json_kind(message)}")
    role, content = (message.get("role", message.get("from")), message.get("content", message.get("value")))
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        raise InputError(where, f"{name} is of the role {role!r}; there are: {known}")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise InputError(where, f"{name} holds more than text")
        content = "".join(str(part) for part in parts)
    if any(message.get(key) for key in _CALLS):
        raise InputError(
            where, f"{name} calls a tool, which no answer shows; write it as text or remove the row"
        )
    weight = message.get("weight") if _ROLES[role] == "assistant" else None
    if weight not in (None, 0, 1):
        raise InputError(
            where, f"{name} has the weight {weight!r}; it may be 1, or 0 for what is not learned"
        )
    if role == "system" and _is_blank(content):
        return Turn("system", "")
    return Turn(_ROLES[role], checked_text(where, name, content), weight is None or bool(weight))


def _seen(row: Mapping[str, Any]) -> str:
    """Name the columns of a row."""
    return f"its columns are {', '.join(map(str, row)) or 'none'}"
