"""Owns examples: rows of {"id", "instruction", "output"} on disk -> validated Example objects.

Refuses to know prompts, tokenizers and models. Keys beyond the three are allowed and ignored.
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

    Raises InputError naming file and row for anything that is not a non-empty list (or lines) of rows with a unique,
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
    """Return the SHA-256 (hexadecimal) of the examples' content, whatever the file's formatting and further keys."""
    content = [[example.id, example.instruction, example.output] for example in examples]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8")).hexdigest()


def _checked_example(where: str, row: Any, need_output: bool) -> Example:
    if not isinstance(row, dict):
        raise InputError(where, f"must be an object with id and instruction, not {json_kind(row)}")
    identifier, instruction = _text(where, row, "id"), _text(where, row, "instruction")
    output = _text(where, row, "output") if need_output or row.get("output") is not None else None
    return Example(identifier, instruction, output)


def _text(where: str, row: dict[str, Any], key: str) -> str:
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
