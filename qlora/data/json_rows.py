"""Owns reading rows: a JSON list, or JSON Lines, of any length -> parsed rows, one by one.

No step holds the text of the whole file, and what is broken is told as soon as it is met. Refuses to know what a
row should hold.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qlora.config import InputError

_PIECE_BYTES = 1 << 20
_MOST_ROW_BYTES = 1 << 26
_LONGEST_TOKEN = (
    16  # characters of JSON that a cut can leave half read: -Infinity, or an escaped surrogate pair
)


def read_rows(path: Path) -> Iterator[Any]:
    """Parse the rows of a file: JSON Lines if its suffix says so, else a JSON list.

    Raises InputError, naming the line, for what can't be read.
    """
    try:
        with open(path, "rb") as file:
            yield from _lines(path, file) if path.suffix in (".jsonl", ".ndjson") else _list_items(path, file)
    except FileNotFoundError:
        raise InputError(path, "no such file; check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(path, f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(path, f"can't be read: {error.strerror}") from None
    except RecursionError:
        raise InputError(path, "is not a list of rows: it is nested too deeply") from None


def json_kind(value: Any) -> str:
    """Say what JSON calls a value, for error lines."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), "null")


def _lines(path: Path, file: BinaryIO) -> Iterator[Any]:
    number = 0
    while line := file.readline(_MOST_ROW_BYTES):
        number += 1
        if len(line) == _MOST_ROW_BYTES:
            raise _too_long(path, number)
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if text.strip():
            try:
                yield json.loads(text)
            except ValueError as error:
                raise _problem(path, number, getattr(error, "colno", 1), error) from None


def _list_items(path: Path, file: BinaryIO) -> Iterator[Any]:
    """Yield the items of a JSON list, reading no further than is needed to complete the next."""
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
        self._path, self._file = path, file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def next_character(self) -> str:
        """Return the next character that is not white space, '' at the end; it is not taken."""
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
        """Take the next value."""
        self.next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # A number at the end of a piece may go on in the next one.
                if end < len(self._text) or not self._more():
                    self._line += self._text.count("\n", self._at, end)
                    self._at = end
                    return value
            except ValueError as error:
                if not self._is_cut(error) or not self._more():
                    place = getattr(error, "pos", self._at)
                    line = self._line + self._text.count("\n", self._at, place)
                    column = place - self._text.rfind("\n", 0, place)
                    raise _problem(self._path, line, column, error) from None

    def whole_value(self) -> Any:
        """Take what the file holds in place of a list."""
        if not self.next_character():
            raise self.broken("Expecting value")
        return self.item()

    def broken(self, problem: str) -> InputError:
        """Describe what stands here."""
        return InputError(f"{self._path}:line {self._line}", f"is not valid JSON: {problem}")

    def _is_cut(self, error: ValueError) -> bool:
        """Tell whether a value may be whole once more is read."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_TOKEN

    def _more(self) -> bool:
        if self._ended:
            return False
        kept = len(self._text) - self._at
        if kept > _MOST_ROW_BYTES:
            raise _too_long(self._path, self._line)
        piece = self._file.read(max(_PIECE_BYTES, kept))  # doubling keeps one long row linear
        self._text = self._text[self._at :] + self._decode.decode(piece, final=not piece)
        self._at, self._ended = 0, not piece
        return not self._ended


def _problem(path: Path, line: int, column: int, error: ValueError) -> InputError:
    """Describe what the parser said of a value, as it stands in a file."""
    where = f"{path}:line {line}"
    if isinstance(error, json.JSONDecodeError):
        return InputError(where, f"is not valid JSON: {error.msg} at column {column}")
    return InputError(where, "holds a number of too many digits; shorten it or write it as text")


def _too_long(path: Path, line: int) -> InputError:
    return InputError(
        f"{path}:line {line}", f"begins a row of more than {_MOST_ROW_BYTES >> 20} MiB, or a quote is missing"
    )
