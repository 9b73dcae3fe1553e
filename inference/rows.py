"""Owns the input rows of a job: checked one by one, and kept where any of them can be read again.

No step holds the text of all rows: a checked row is written to a file, one JSON list a line, and only ids
(while rows are checked) and byte offsets are kept in memory.

Refuses to know prompts and models.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.data.examples import as_json, checked_examples, from_json
from qlora.data.row_shapes import AS_FOUND, Example, RowShape, Turn
from qlora.data.sources import Places
from qlora.files import replacing

_FEW_ROWS = 1024


@dataclass(frozen=True)
class RowStore:
    """Checked rows in a JSON Lines file.

    offsets: the byte where each row begins. digest: SHA-256 (hexadecimal) of ids, instructions and outputs.
    has_outputs: true if every row has one.
    """

    path: Path
    offsets: "array[int]"
    digest: str
    has_outputs: bool

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, start: int, end: int) -> list[Example]:
        """Read rows start .. end - 1."""
        return self.read_some(range(start, end))

    def all(self) -> Iterator[Example]:
        """Read all rows, a few at a time."""
        for start in range(0, len(self), _FEW_ROWS):
            yield from self.read(start, min(start + _FEW_ROWS, len(self)))

    def read_some(self, numbers: Sequence[int]) -> list[Example]:
        """Read the rows with these numbers, ascending, and no others."""
        examples = []
        next_number = -1  # of the row that the file stands at
        with open(self.path, "rb") as file:
            for number in numbers:
                if number != next_number:
                    file.seek(self.offsets[number])
                examples.append(from_json(json.loads(file.readline())))
                next_number = number + 1
        return examples


class RowReader:
    """A server of a RowStore's rows, on the node where their file is.

    Its process loads what this module does, and no model's libraries.
    """

    def __init__(self, rows: RowStore):
        self.rows = rows

    def turns(self, numbers: list[int]) -> list[tuple[Turn, ...]]:
        """Return what is asked in rows, given in ascending order."""
        return [example.turns for example in self.rows.read_some(numbers)]


def store_rows(places: Places, folder: Path, shape: RowShape = AS_FOUND) -> RowStore:
    """Check all rows of a set and keep them in `folder`, in place of what is kept there.

    Raises InputError as `load_examples` does.
    """
    offsets = array("q")
    digest = hashlib.sha256()
    has_outputs = True
    kept = folder / "rows.jsonl"
    end = 0
    with replacing(kept, "batch rows") as file:
        for example in checked_examples(places, shape, need_output=False):
            line = json.dumps(as_json(example), ensure_ascii=False) + "\n"
            encoded = line.encode()
            offsets.append(end)
            digest.update(encoded)
            file.write(line)
            end += len(encoded)
            has_outputs = has_outputs and example.output is not None
    # What serves them on a cluster works in another folder.
    return RowStore(path=kept.absolute(), offsets=offsets, digest=digest.hexdigest(), has_outputs=has_outputs)
