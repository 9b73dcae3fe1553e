"""Owns examples: from the rows of a set to validated Example objects, each with an id of its own.

Refuses to know formats of files, prompts, tokenizers and models.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qlora.config import InputError
from qlora.data.row_shapes import AS_FOUND, Example, FoundShape, RowShape, Turn
from qlora.data.sources import Places, joined, read_rows

_LOOKED_AT = 1000  # rows of a set, for what they hold


def load_examples(places: Places, shape: RowShape = AS_FOUND, *, need_output: bool) -> list[Example]:
    """Load the examples of a set, in their order.

    Raises InputError, naming file and row, for a file that can't be read, a set without rows, an id that was
    used before, and a row that is not of the set's shape; if `need_output`, every row needs an answer.
    """
    return list(checked_examples(places, shape, need_output=need_output))


def checked_examples(places: Places, shape: RowShape = AS_FOUND, *, need_output: bool) -> Iterator[Example]:
    """Read the examples of a set one by one. Raises InputError as `load_examples` does."""
    number_of: dict[str, int] = {}  # by id
    starts: list[tuple[int, str]] = []  # of each place: the number of its first row, and where that is
    found = None
    for number, (where, row) in enumerate(read_rows(places)):
        found = found or shape.of_row(where, row)
        if where.endswith(":row 0"):
            starts.append((number, where))
        example = found.example(where, number, row, need_output)
        key = str(example.id)
        if (before := number_of.setdefault(key, number)) != number:
            problem = f"id {example.id!r} was used in row {before}; ids must be unique"
            raise InputError(where, problem + _place_of(before, starts, found.has_id(row)))
        yield example
    if found is None:
        raise InputError(joined(places), "holds no rows; give at least one")


def _place_of(number: int, starts: Sequence[tuple[int, str]], has_id: bool) -> str:
    """Say where the row of a set is that had an id first, if there are several places; and of ids as numbers.

    `has_id`: whether the later row has one of its own.
    """
    first, where = next(start for start in reversed(starts) if start[0] <= number)
    place = f"; that is {where.removesuffix('0')}{number - first}" if len(starts) > 1 else ""
    return place if has_id else f"{place}; a row without an id has its number"


def found_shape(places: Places, shape: RowShape = AS_FOUND) -> FoundShape:
    """Return the shape that a set has by its first row, with what the first thousand hold besides.

    Raises InputError if it has no rows, or its first is of no known shape.
    """
    found = None
    for _, (where, row) in zip(range(_LOOKED_AT), read_rows(places), strict=False):
        found = shape.of_row(where, row) if found is None else found.seen_with(row)
    if found is None:
        raise InputError(joined(places), "holds no rows; give at least one")
    return found


def examples_digest(examples: Iterable[Example]) -> str:
    """Return the SHA-256 (hexadecimal) of the examples' content.

    The file's formatting and its further columns make no difference.
    """
    content = [as_json(example) for example in examples]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8")).hexdigest()


def as_json(example: Example) -> list[Any]:
    """Return an example as a list that JSON can write: its id, what is asked, its answer.

    What is asked is a text for an instruction, else a list of [role, content], with a false for a turn of the
    assistant that is not learned.
    """
    asked = [[turn.role, turn.content, *([] if turn.is_learned else [False])] for turn in example.turns]
    return [example.id, example.instruction if example.is_instruction else asked, example.output]


def from_json(content: list[Any]) -> Example:
    """Make an example again of what `as_json` returned."""
    identifier, asked, output = content
    turns: list[Any] = [("user", asked)] if isinstance(asked, str) else asked
    return Example(identifier, tuple(Turn(*turn) for turn in turns), output)
