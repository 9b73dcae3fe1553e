"""Owns input rows: a JSON list or JSONL of any length -> rows checked one by one, and kept where any of them can be read again.

No step holds the text of all rows: the file is parsed piece by piece, and what is kept in memory is ids and byte offsets.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qlora.config import InputError
from qlora.data.examples import Example, checked_example, json_kind

_PIECE_BYTES = 1 << 20


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
        """Rows start .. end - 1."""
        with open(self.path, "rb") as file:
            file.seek(self.offsets[start])
            return [Example(*json.loads(file.readline())) for _ in range(start, end)]


def store_rows(path: Path, folder: Path) -> RowStore:
    """Check all rows of a file and keep them in `folder`.

    Raises InputError naming file and row for anything that is not a non-empty list (or lines) of rows with a unique id and an
    instruction.
    """
    row_of_id: dict[str, int] = {}
    offsets, digest, has_outputs = array("q"), hashlib.sha256(), True
    kept = folder / "rows.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with open(kept, "wb") as file:
        for number, row in enumerate(_parsed_rows(path)):
            where = f"{path}:row {number}"
            example = checked_example(where, row, False)
            if example.id in row_of_id:
                raise InputError(
                    where, f"id {example.id!r} was used in row {row_of_id[example.id]}; ids must be unique"
                )
            row_of_id[example.id] = number
            line = (
                json.dumps([example.id, example.instruction, example.output], ensure_ascii=False).encode()
                + b"\n"
            )
            offsets.append(file.tell())
            digest.update(line)
            file.write(line)
            has_outputs = has_outputs and example.output is not None
    if not offsets:
        raise InputError(path, "holds no rows; give at least one")
    return RowStore(kept, offsets, digest.hexdigest(), has_outputs)


def _parsed_rows(path: Path) -> Iterator[Any]:
    try:
        with open(path, "rb") as file:
            yield from (
                _lines(path, file) if path.suffix in (".jsonl", ".ndjson") else _list_items(path, file)
            )
    except FileNotFoundError:
        raise InputError(path, "no such file; check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(path, f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(path, f"can't be read: {error.strerror}") from None
    except RecursionError:
        raise InputError(path, "is not a list of rows: it is nested too deeply") from None


def _lines(path: Path, file: BinaryIO) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if text.strip():
            try:
                yield json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}:line {number}", f"is not valid JSON: {error.msg} at column {error.colno}"
                ) from None


def _list_items(path: Path, file: BinaryIO) -> Iterator[Any]:
    """The items of a JSON list, one after another, reading no further than is needed to complete the next."""
    text = _Text(path, file)
    if text.next_character() != "[":
        raise InputError(path, f"must be a JSON list of rows, not {json_kind(text.whole_value())}")
    text.skip(1)
    if text.next_character() == "]":
        text.skip(1)
    else:
        while True:
            yield text.item()
            separator = text.next_character()
            if separator not in (",", "]"):
                raise text.broken("Expecting ',' delimiter")
            text.skip(1)
            if separator == "]":
                break
    if text.next_character():
        raise text.broken("Extra data")


class _Text:
    """A file's text in pieces: what has been read and not yet taken, and where it stands."""

    def __init__(self, path: Path, file: BinaryIO):
        import codecs

        self._path, self._file = path, file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def next_character(self) -> str:
        """The next character that is not white space, '' at the end; not taken."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._line += self._text[self._at] == "\n"
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, count: int) -> None:
        """Take characters."""
        self._at += count

    def item(self) -> Any:
        """The next value, taken."""
        self.next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # A number at the end of a piece may go on in the next one.
                if end < len(self._text) or not self._more():
                    self._line += self._text.count("\n", self._at, end)
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if not self._more():
                    line = self._line + self._text.count("\n", self._at, error.pos)
                    column = error.pos - self._text.rfind("\n", 0, error.pos)
                    raise InputError(
                        f"{self._path}:line {line}", f"is not valid JSON: {error.msg} at column {column}"
                    ) from None

    def whole_value(self) -> Any:
        """What the file holds in place of a list."""
        if not self.next_character():
            raise self.broken("Expecting value")
        return self.item()

    def broken(self, problem: str) -> InputError:
        """The error for what stands here."""
        return InputError(f"{self._path}:line {self._line}", f"is not valid JSON: {problem}")

    def _more(self) -> bool:
        if self._ended:
            return False
        # doubling keeps one long row linear
        piece = self._file.read(max(_PIECE_BYTES, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + self._decode.decode(piece, final=not piece), 0
        self._ended = not piece
        return not self._ended
