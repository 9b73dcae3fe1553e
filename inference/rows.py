"""Owns the input rows of a job: checked one by one, and kept where any of them can be read again.

No step holds the text of all rows: what is kept in memory is ids and byte offsets.
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.data.examples import Example, checked_examples


@dataclass(frozen=True)
class RowStore:
    """Checked rows in a JSONL file of our own: `offsets` has where each begins. `digest`: SHA-256 of ids, instructions, outputs."""

    path: Path
    offsets: "array[int]"
    digest: str
    has_outputs: bool

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, start: int, end: int) -> list[Example]:
        """Read rows start .. end - 1."""
        return self.read_some(range(start, end))

    def read_some(self, numbers: Sequence[int]) -> list[Example]:
        """Read the rows with these numbers, ascending, and no others."""
        examples, at = [], -1
        with open(self.path, "rb") as file:
            for number in numbers:
                if number != at:
                    file.seek(self.offsets[number])
                examples.append(Example(*json.loads(file.readline())))
                at = number + 1
        return examples


def store_rows(path: Path, folder: Path) -> RowStore:
    """Check all rows of a file and keep them in `folder`. Raises InputError as qlora.data.examples does."""
    offsets, digest, has_outputs = array("q"), hashlib.sha256(), True
    kept = folder / "rows.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with open(kept, "wb") as file:
        for example in checked_examples(path, need_output=False):
            content = [example.id, example.instruction, example.output]
            line = json.dumps(content, ensure_ascii=False).encode() + b"\n"
            offsets.append(file.tell())
            digest.update(line)
            file.write(line)
            has_outputs = has_outputs and example.output is not None
    return RowStore(kept, offsets, digest.hexdigest(), has_outputs)
