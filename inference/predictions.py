"""Owns predictions on disk: first in a journal, as rows are done, and then in one ordered file.

The journal is what a stopped job goes on from. It has one line for each finished row, [index, text] or
[index, null, error]; only the places of those lines are kept in memory. The driver is its only writer, so
every row is kept once, whatever workers died. (Ray Data's own checkpoint is keyed by column values and
written by workers; it would need a disk that all nodes share.)

Refuses to know how texts are generated.
"""

import json
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from inference.rows import RowStore
from qlora.config import InputError
from qlora.data.examples import Example
from qlora.files import write_json

_WRITE_ROWS = 1000


def work_folder(output: Path) -> Path:
    """Return the folder, beside the output, of a job's rows and journal.

    It is removed when the job is done.
    """
    return output.with_name(f".{output.name}.work")


class Journal:
    """The finished rows of a job, in a file whose first line has the job's settings."""

    def __init__(self, folder: Path, settings: dict[str, Any], num_rows: int, *, resume: bool):
        """Open the journal of a job; with `resume` its rows are kept, else it starts afresh.

        Raises InputError, naming what changed, if kept rows belong to a job with other settings.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "journal.jsonl"
        self.places = array("q", [-1]) * num_rows  # the byte where a row's line begins; -1 if it is not done
        self.num_done = 0
        if resume and self.path.exists():
            end = self._read(settings)
            os.truncate(self.path, end)
            self._file: BinaryIO = open(self.path, "r+b")  # noqa: SIM115
            self._file.seek(end)
        else:
            self._file = open(self.path, "w+b")  # noqa: SIM115
            self._write_line(settings)
            self._file.flush()

    def missing(self) -> list[int]:
        """Return the indices of rows that are not done."""
        return [index for index, place in enumerate(self.places) if place < 0]

    def append(self, results: list[tuple[int, str | None, str | None]]) -> int:
        """Keep (index, text, error) of rows; return how many were new.

        A row that is there already is left out.
        """
        num_new = 0
        for index, text, error in results:
            if self.places[index] < 0:
                self.places[index] = self._file.tell()
                self._write_line([index, text] if error is None else [index, None, error])
                num_new += 1
        self._file.flush()
        self.num_done += num_new
        return num_new

    def read(self, index: int) -> tuple[str | None, str | None]:
        """Return the text and the error of a finished row, one of which is None."""
        self._file.seek(self.places[index])
        _, text, *error = json.loads(self._file.readline())
        return text, error[0] if error else None

    def close(self) -> None:
        """Close the journal's file."""
        self._file.close()

    def _write_line(self, content: Any) -> None:
        self._file.write(json.dumps(content, ensure_ascii=False, sort_keys=True).encode() + b"\n")

    def _read(self, settings: dict[str, Any]) -> int:
        """Read the finished rows of a journal; return where its last whole line ends.

        Raises InputError if its first line has other settings.
        """
        wanted = json.loads(json.dumps(settings))  # as they look when they were written and read
        with open(self.path, "rb") as file:
            try:
                old = json.loads(file.readline())
            except ValueError:
                old = {}
            changed = [key for key in {**old, **wanted} if old.get(key) != wanted.get(key)]
            if changed:
                raise InputError(
                    self.path.parent,
                    f"holds rows of a job with another {', '.join(changed)}; "
                    "run without --resume to start afresh",
                )
            end = file.tell()
            for line in iter(file.readline, b""):
                if not line.endswith(b"\n"):
                    break  # a kill cut this line short
                index = json.loads(line)[0]
                self.num_done += self.places[index] < 0
                self.places[index] = end
                end = file.tell()
            return end


def write_predictions(
    path: Path,
    rows: RowStore,
    journal: Journal,
    each: Callable[[Example, str], None] = lambda example, text: None,
) -> list[dict[str, Any]]:
    """Write [{"id", "output"}] in input order, replacing the file in one move; return the rows that failed.

    A row that failed has an empty output; its {"row", "id", "error"} is returned, and written to
    PATH.errors.json. `each` is called with every row that has a text, and that text.
    """
    errors: list[dict[str, Any]] = []
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with open(unfinished, "w", encoding="utf-8") as file:
        for number, (example, text, error) in enumerate(_in_order(rows, journal)):
            if error is None:
                each(example, text or "")
            else:
                errors.append({"row": number, "id": example.id, "error": error})
            content = {"id": example.id, "output": text or ""}
            item = json.dumps(content, ensure_ascii=False, indent=1).replace("\n", "\n ")
            file.write(("[\n " if number == 0 else ",\n ") + item)
        file.write("\n]\n")
        file.flush()
        os.fsync(file.fileno())
    errors_path = beside(path, "errors")
    if errors:
        write_json(errors_path, errors)
    else:
        errors_path.unlink(missing_ok=True)
    unfinished.replace(path)
    return errors


def beside(path: Path, kind: str) -> Path:
    """Return the path of a file beside an output: PATH.errors.json or PATH.meta.json."""
    return path.with_name(f"{path.name}.{kind}.json")


def _in_order(rows: RowStore, journal: Journal) -> Iterator[tuple[Example, str | None, str | None]]:
    """Read each row's example, text and error, in input order, so many rows at a time."""
    for start in range(0, len(rows), _WRITE_ROWS):
        end = min(start + _WRITE_ROWS, len(rows))
        for number, example in enumerate(rows.read(start, end), start):
            yield example, *journal.read(number)
