"""Owns predictions on disk: first in a journal, as rows are done, and then in one ordered file.

The journal is what a stopped job goes on from. Its first line has the job's settings; each further one has a
finished row, [index, text] or [index, null, error], or the name of an engine, {"engine": name}. Only the
places of rows' lines are kept in memory. The driver is its only writer, so every row is kept once, whatever
workers died. (Ray Data's own checkpoint is keyed by column values and written by workers; it would need a
disk that all nodes share.)

Whatever happens to its bytes, a journal gives only what was put into it: a line stands as ["sum", content]
with a checksum, in which the settings are summed up, too. Lines that don't agree with it are left out.

Refuses to know how texts are generated.
"""

import json
import os
import time
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from inference.output_files import output_file
from inference.rows import RowStore
from qlora.config import InputError
from qlora.data.row_shapes import Example
from qlora.failpoints import durable
from qlora.files import replacing, write_json

JOURNAL = "journal.jsonl"
_SYNC_SECONDS = 1.0  # a machine that loses its power loses no more work than of this time
_START, _END = len('["01234567", '), len("]\n")  # of a line, around its content


def work_folder(output: Path) -> Path:
    """Return the folder, beside the output, of a job's rows and journal.

    It is removed when the job is done.
    """
    return output.with_name(f".{output.name}.work")


class Journal:
    """The finished rows of a job, in a file whose first line has the job's settings.

    engines: the names of engines that rows came from. damage: words on lines that were left out, or "".
    """

    def __init__(self, folder: Path, settings: dict[str, Any], num_rows: int, *, resume: bool):
        """Open the journal of a job; with `resume` its rows are kept, else it starts afresh.

        A journal with lines that are left out is replaced by one without them. Raises InputError, naming what
        changed, if kept rows belong to a job with other settings, and if that can't be told.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / JOURNAL
        self.places = array("q", [-1]) * num_rows  # the byte where a row's line begins; -1 if it is not done
        self.num_done = 0
        self.engines: set[str] = set()
        self.damage = ""
        self._first = _content(settings)
        if resume and self.path.exists():
            self._read(settings)
        else:
            with replacing(self.path, "batch journal") as file:
                file.write(_line(self._first).decode())
        self._sum = zlib.crc32(self._first)
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        self._reader = open(self.path, "rb")  # noqa: SIM115
        self._end = self.path.stat().st_size
        self._synced = time.monotonic()

    def missing(self) -> list[int]:
        """Return the indices of rows that are not done."""
        return [index for index, place in enumerate(self.places) if place < 0]

    def append(self, results: list[tuple[int, str | None, str | None]], engine: str | None = None) -> int:
        """Keep (index, text, error) of rows, which came from one engine; return how many were new.

        A row that is there already is left out. Raises OSError; what the disk still took can be read.
        """
        lines = bytearray()
        if engine and engine not in self.engines:
            lines += _line(_content({"engine": engine}), self._sum)
        places: dict[int, int] = {}
        for index, text, error in results:
            if self.places[index] < 0 and index not in places:
                places[index] = self._end + len(lines)
                content = [index, text] if error is None else [index, None, error]
                lines += _line(_content(content), self._sum)
        with durable("journal append"):
            self._write(lines)
        for index, place in places.items():
            self.places[index] = place
        if engine:
            self.engines.add(engine)
        self.num_done += len(places)
        return len(places)

    def read(self, index: int) -> tuple[str | None, str | None]:
        """Return the text and the error of a finished row, one of which is None."""
        self._reader.seek(self.places[index])
        _, text, *error = json.loads(self._reader.readline()[_START:-_END])
        return text, error[0] if error else None

    def close(self) -> None:
        """Bring what was kept to the disk, and close the journal's file."""
        os.fsync(self._file.fileno())
        self._file.close()
        self._reader.close()

    def _write(self, lines: bytearray) -> None:
        """Write lines at the journal's end, and have them on the disk about once a second."""
        rest = memoryview(lines)
        while rest:  # a disk that gets full takes a part first
            rest = rest[os.pwrite(self._file.fileno(), rest, self._end + len(lines) - len(rest)) :]
        self._end += len(lines)
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _read(self, settings: dict[str, Any]) -> None:
        """Read the finished rows of a journal. Raises InputError if its first line has other settings."""
        mend = "run without --resume to start afresh"
        wanted = json.loads(json.dumps(settings))  # as they look when they were written and read
        try:
            with open(self.path, "rb") as file:
                line = file.readline()
                first = _checked(line)
                has_sums = first is not None
                old = _parsed(line if first is None else first)  # journals had no checksums once
                if not isinstance(old, dict):
                    raise InputError(self.path, f"is damaged; {mend}")
                changed = [key for key in {**old, **wanted} if _given(old, key) != _given(wanted, key)]
                if changed:
                    problem = f"holds rows of a job with another {', '.join(changed)}; {mend}"
                    raise InputError(self.path.parent, problem)
                if first is not None:
                    self._first = first
                is_whole = self._read_lines(file, len(line), has_sums)
        except OSError as error:
            raise InputError(self.path, f"can't be read ({error.strerror}); {mend}") from None
        if not (is_whole and has_sums):
            self._write_again(has_sums)

    def _read_lines(self, file: Iterator[bytes], place: int, has_sums: bool) -> bool:
        """Read lines after the first, from this place on; tell whether none was left out."""
        num_damaged = num_repeated = 0
        sum_before = zlib.crc32(self._first)
        for line in file:
            content = _checked(line, sum_before) if has_sums else line
            entry = None if content is None else self._entry(content)
            if entry is None or not line.endswith(b"\n"):
                num_damaged += 1
            elif isinstance(entry, str):
                self.engines.add(entry)
            elif self.places[entry] >= 0:
                num_repeated += 1
            else:
                self.places[entry] = place
                self.num_done += 1
            place += len(line)
        words = []
        if num_damaged == 1:
            words.append("1 damaged line is left out; what it held is generated again")
        elif num_damaged:
            words.append(f"{num_damaged} damaged lines are left out; their rows are generated again")
        if num_repeated:
            words.append(f"{num_repeated} repeated line{'s are' if num_repeated > 1 else ' is'} left out")
        self.damage = f"journal: {'; '.join(words)}" if words else ""
        return not words

    def _entry(self, content: bytes) -> int | str | None:
        """Return the index of the finished row, or the engine's name, that a line has; None if neither."""
        match _parsed(content):
            case {"engine": str(name)}:
                return name
            case [index, str()] | [index, None, str()]:
                return index if type(index) is int and 0 <= index < len(self.places) else None
        return None

    def _write_again(self, has_sums: bool) -> None:
        """Replace the journal by one of the lines that were read."""
        sum_before = zlib.crc32(self._first)
        with open(self.path, "rb") as old, replacing(self.path, "batch journal") as new:
            heads = _line(self._first)
            for name in sorted(self.engines):
                heads += _line(_content({"engine": name}), sum_before)
            new.write(heads.decode())
            end = len(heads)
            for index, place in enumerate(self.places):
                if place >= 0:
                    old.seek(place)
                    line = old.readline()
                    line = line if has_sums else _line(line.rstrip(b"\n"), sum_before)
                    new.write(line.decode())
                    self.places[index] = end
                    end += len(line)


def _given(settings: dict[str, Any], key: str) -> Any:
    """Return a setting without what it leaves open: a journal from before a choice came leaves it open."""
    value = settings.get(key)
    return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


def _content(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


def _line(content: bytes, sum_before: int = 0) -> bytes:
    """Return the line that has a content, with a checksum that goes on from the one before."""
    return b'["%08x", %b]\n' % (zlib.crc32(content, sum_before), content)


def _checked(line: bytes, sum_before: int = 0) -> bytes | None:
    """Return the content of a line; None if the line is not what `_line` wrote."""
    content = line[_START:-_END]
    return content if line == _line(content, sum_before) else None


def _parsed(text: bytes) -> Any:
    """Return the JSON value of a text, None if it has none."""
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        return None


def write_predictions(
    path: Path,
    rows: RowStore,
    journal: Journal,
    each: Callable[[Example, str], None] = lambda example, text: None,
) -> list[dict[str, Any]]:
    """Write {"id", "output"} of all rows in input order; return the rows that failed.

    The file is replaced in one move, and of the format that its suffix says (inference.output_files).

    A row that failed has an empty output; its {"row", "id", "error"} is returned, and written to
    PATH.errors.json before the output is in its place. `each` is called with every row that has a text, and
    that text.
    """
    errors: list[dict[str, Any]] = []
    with output_file(path, lambda: (example.id for example in rows.all())) as add:
        for number, (example, text, error) in enumerate(_in_order(rows, journal)):
            if error is None:
                each(example, text or "")
            else:
                errors.append({"row": number, "id": example.id, "error": error})
            add(example.id, text or "")
        if errors:
            write_json(beside(path, "errors"), errors, "batch errors")
        else:
            with durable("batch errors removed"):
                beside(path, "errors").unlink(missing_ok=True)
    return errors


def beside(path: Path, kind: str) -> Path:
    """Return the path of a file beside an output: PATH.errors.json or PATH.meta.json."""
    return path.with_name(f"{path.name}.{kind}.json")


def _in_order(rows: RowStore, journal: Journal) -> Iterator[tuple[Example, str | None, str | None]]:
    """Read each row's example, text and error, in input order."""
    for number, example in enumerate(rows.all()):
        yield example, *journal.read(number)
