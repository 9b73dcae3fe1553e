"""Owns examples: from the rows of a set to validated Example objects, each with an id of its own.

Refuses to know formats of files, prompts, tokenizers and models.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from qlora.config import InputError
from qlora.data.row_shapes import AS_FOUND, Example, FoundShape, RowShape, Turn
from qlora.data.sources import Places, joined, read_rows


def load_examples(places: Places, shape: RowShape = AS_FOUND, *, need_output: bool) -> list[Example]:
    """Load the examples of a set, in their order.

    Raises InputError, naming file and row, for a file that can't be read, a set without rows, an id that was
    used before, and a row that is not of the set's shape; if `need_output`, every row needs an answer.
    """
    return list(checked_examples(places, shape, need_output=need_output))


def checked_examples(places: Places, shape: RowShape = AS_FOUND, *, need_output: bool) -> Iterator[Example]:
    """Read the examples of a set one by one. Raises InputError as `load_examples` does."""
    place_of_id: dict[str, int] = {}
    found = None
    for number, (where, row) in enumerate(read_rows(places)):
        found = found or shape.of_row(where, row)
        example = found.example(where, number, row, need_output)
        key = str(example.id)
        if key in place_of_id:
            before = place_of_id[key]
            raise InputError(where, f"id {example.id!r} was used in row {before}; ids must be unique")
        place_of_id[key] = number
        yield example
    if found is None:
        raise InputError(joined(places), "holds no rows; give at least one")


def found_shape(places: Places, shape: RowShape = AS_FOUND) -> FoundShape:
    """Return the shape that a set has by its first row.

    Raises InputError if it has no rows, or its first is of no known shape.
    """
    for where, row in read_rows(places):
        return shape.of_row(where, row)
    raise InputError(joined(places), "holds no rows; give at least one")


def examples_digest(examples: Iterable[Example]) -> str:
    """Return the SHA-256 (hexadecimal) of the examples' content.

    The file's formatting and its further columns make no difference.
    """
    content = [as_json(example) for example in examples]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8")).hexdigest()


def as_json(example: Example) -> list[Any]:
    """Return an example as a list that JSON can write: its id, what is asked, its answer.

    What is asked is a text for an instruction, else a list of [role, content].
    """
    asked = [[turn.role, turn.content] for turn in example.turns]
    return [example.id, example.instruction if example.is_instruction else asked, example.output]


def from_json(content: list[Any]) -> Example:
    """Make an example again of what `as_json` returned."""
    identifier, asked, output = content
    turns: list[Any] = [("user", asked)] if isinstance(asked, str) else asked
    return Example(identifier, tuple(Turn(role, text) for role, text in turns), output)
