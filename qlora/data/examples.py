"""Owns examples: JSON lists of {"id", "instruction", "output"} on disk -> validated Example objects.

Refuses to know prompts, tokenizers and models. Keys beyond the three are allowed and ignored.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.config import InputError


@dataclass(frozen=True)
class Example:
    """One row of a data file; `output` is None in a test file without answers."""

    id: str
    instruction: str
    output: str | None


def load_examples(path: str | Path, *, need_output: bool) -> list[Example]:
    """Examples of a JSON list, in file order.

    Raises InputError naming file and row for anything that is not a non-empty list of rows with a unique, non-empty string
    `id`, a non-empty `instruction` and, if `need_output`, a non-empty `output`.
    """
    rows = _read_json(Path(path))
    if not isinstance(rows, list):
        raise InputError(path, f"must be a JSON list of rows, not {json_kind(rows)}")
    if not rows:
        raise InputError(path, "holds no rows; give at least one")
    examples: list[Example] = []
    row_of_id: dict[str, int] = {}
    for number, row in enumerate(rows):
        where = f"{path}:row {number}"
        example = checked_example(where, row, need_output)
        if example.id in row_of_id:
            raise InputError(
                where, f"id {example.id!r} was used in row {row_of_id[example.id]}; ids must be unique"
            )
        row_of_id[example.id] = number
        examples.append(example)
    return examples


def examples_digest(examples: list[Example]) -> str:
    """SHA-256 (hexadecimal) of the examples' content, whatever the file's formatting and further keys."""
    content = [[example.id, example.instruction, example.output] for example in examples]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8")).hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(path, "no such file; check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(path, f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(path, f"can't be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:line {error.lineno}", f"is not valid JSON: {error.msg} at column {error.colno}"
        ) from None
    except RecursionError:
        raise InputError(path, "is not a list of rows: it is nested too deeply") from None


def checked_example(where: str, row: Any, need_output: bool) -> Example:
    """One parsed row as an Example. Raises InputError, naming `where`, for what `load_examples` refuses in a row."""
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
        raise InputError(
            where, f"{key} holds half a surrogate pair, which is no character; mend the text"
        ) from None
    return value


def json_kind(value: Any) -> str:
    """What JSON calls a value, for error lines."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), "null")
