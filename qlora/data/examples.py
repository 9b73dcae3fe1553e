"""Owns examples: from rows of {"id", "instruction", "output"} on disk to validated Example objects.

This is the layout of instruction tuning data since Alpaca (https://github.com/tatsu-lab/stanford_alpaca),
without its `input` and with an id. Keys beyond the three are allowed and ignored.

Refuses to know prompts, tokenizers and models.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.config import InputError
from qlora.data.json_rows import json_kind, read_rows


@dataclass(frozen=True)
class Example:
    """One row of a data file; `output` is None in a test file without answers."""

    id: str
    instruction: str
    output: str | None


def load_examples(path: str | Path, *, need_output: bool) -> list[Example]:
    """Load the examples of a file, in their order.

    Raises InputError, naming file and row, unless the file holds at least one row and every row has a unique,
    non-empty string `id`, a non-empty `instruction` and, if `need_output`, a non-empty `output`.
    """
    return list(checked_examples(path, need_output))


def checked_examples(path: str | Path, need_output: bool) -> Iterator[Example]:
    """Read the examples of a file one by one. Raises InputError as `load_examples` does."""
    row_of_id: dict[str, int] = {}
    for number, row in enumerate(read_rows(Path(path))):
        where = f"{path}:row {number}"
        example = _checked_example(where, row, need_output)
        if example.id in row_of_id:
            before = row_of_id[example.id]
            raise InputError(where, f"id {example.id!r} was used in row {before}; ids must be unique")
        row_of_id[example.id] = number
        yield example
    if not row_of_id:
        raise InputError(path, "holds no rows; give at least one")


def examples_digest(examples: list[Example]) -> str:
    """Return the SHA-256 (hexadecimal) of the examples' content.

    The file's formatting and its further keys make no difference.
    """
    content = [[example.id, example.instruction, example.output] for example in examples]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8")).hexdigest()


def _checked_example(where: str, row: Any, need_output: bool) -> Example:
    """Convert a row to an Example. Raises InputError, naming `where`, for what a row may not be."""
    if not isinstance(row, dict):
        raise InputError(where, f"must be an object with id and instruction, not {json_kind(row)}")
    identifier = _text(where, row, "id")
    instruction = _text(where, row, "instruction")
    has_output = need_output or row.get("output") is not None
    output = _text(where, row, "output") if has_output else None
    return Example(identifier, instruction, output)


def _text(where: str, row: dict[str, Any], key: str) -> str:
    """Return the text under a key of a row.

    Raises InputError if there is none, or it can't be written as UTF-8.
    """
    if key not in row:
        raise InputError(where, f"has no {key!r}; add it")
    value = row[key]
    if not isinstance(value, str):
        raise InputError(where, f"{key} must be text, not {json_kind(value)}")
    if not value.strip():
        raise InputError(where, f"{key} is empty; fill it or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        problem = f"{key} holds half a surrogate pair, which is no character; mend the text"
        raise InputError(where, problem) from None
    return value
