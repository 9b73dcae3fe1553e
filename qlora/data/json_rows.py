"""Owns reading JSON: from a list, or JSON Lines, of any length to rows, one by one.

Of a list, Python's JSON decoder is asked for one value at a time, and more text is read only if it ran out of
text within a value. So no step holds the text of the whole file, and an error is raised, with its line, as
soon as the broken place is reached. ijson, which streams too, reads half a surrogate pair as a question mark
on its C parser without a word, refuses whole numbers of more than 64 bits, knows no lines, and is slower.

Refuses to know what a row should hold.
"""

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from qlora.config import InputError
from qlora.data.table_rows import MOST_ROW_BYTES

_NO_ROWS = "must be a JSON list of rows, or one row a line"
_PIECE_BYTES = 1 << 20
_LONGEST_TOKEN = 16  # characters that a cut can leave half read: -Infinity, or an escaped surrogate pair


def json_rows(place: str, file: BinaryIO) -> Iterator[Any]:
    """Parse the items of a JSON list or, if the file begins with an object, the lines of JSON Lines.

    Raises InputError, naming the line, for what is neither.
    """
    text = _Text(place, file)
    start = text.next_character()
    if start == "[":
        yield from _list_items(text)
    elif start == "{":
        file.seek(0)
        yield from _lines(place, file)
    elif not start:
        raise InputError(place, "is empty, which is not valid JSON; give at least one row")
    else:
        raise InputError(place, f"{_NO_ROWS}, not {json_kind(text.whole_value())}")


def json_kind(value: Any) -> str:
    """Return what JSON calls the kind of a value, for error lines."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _lines(place: str, file: BinaryIO) -> Iterator[Any]:
    """Parse the lines of a JSON Lines file one by one; blank lines are passed over."""
    number = 0
    while line := file.readline(MOST_ROW_BYTES):
        number += 1
        if len(line) == MOST_ROW_BYTES:
            raise _too_long(place, number)
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if text.strip():
            try:
                yield json.loads(text, object_pairs_hook=_with_unique_keys)
            except ValueError as error:
                if _is_one_value(place, file):
                    raise InputError(place, f"{_NO_ROWS}, not an object of several lines") from None
                raise _problem(place, number, getattr(error, "colno", 1), error) from None


def _is_one_value(place: str, file: BinaryIO) -> bool:
    """Tell whether a file is a single JSON value, whatever its lines."""
    file.seek(0)
    text = _Text(place, file, json.JSONDecoder())
    try:
        text.item()
        return not text.next_character()
    except (InputError, UnicodeDecodeError):
        return False


def _list_items(text: "_Text") -> Iterator[Any]:
    """Yield the items of a JSON list, reading no further than is needed to complete the next."""
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


class _TwiceError(ValueError):
    """A key that stands twice in an object, of which parsers keep one."""


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of an object's pairs. Raises _TwiceError at the second of two equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise _TwiceError(f"holds the key {twice!r} twice in an object; keep one")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_with_unique_keys)


class _Text:
    """A file's text in pieces: what has been read and not yet taken, and the line where it stands."""

    def __init__(self, place: str, file: BinaryIO, decoder: json.JSONDecoder = _DECODER):
        self._place = place
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = decoder
        self._text = ""  # what is read; all before self._at is taken
        self._at = 0
        self._line = 1
        self._ended = False

    def next_character(self) -> str:
        """Return the next character that is not white space, without taking it; '' at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._line += self._text[self._at] == "\n"
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, count: int) -> None:
        """Take so many characters."""
        self._at += count

    def item(self) -> Any:
        """Take the next JSON value. Raises InputError, naming line and column, if there is none."""
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
                    raise _problem(self._place, line, column, error) from None

    def whole_value(self) -> Any:
        """Take the value that the file holds in place of a list."""
        self.next_character()
        return self.item()

    def broken(self, problem: str) -> InputError:
        """Return the error for what stands here."""
        return InputError(f"{self._place}:line {self._line}", f"is not valid JSON: {problem}")

    def _is_cut(self, error: ValueError) -> bool:
        """Tell whether a value may be whole once more is read."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_TOKEN

    def _more(self) -> bool:
        """Read another piece; tell whether there was one."""
        if self._ended:
            return False
        kept = len(self._text) - self._at
        if kept > MOST_ROW_BYTES:
            raise _too_long(self._place, self._line)
        piece = self._file.read(max(_PIECE_BYTES, kept))  # doubling keeps one long row linear
        self._text = self._text[self._at :] + self._decode.decode(piece, final=not piece)
        self._at = 0
        self._ended = not piece
        return not self._ended


def _problem(place: str, line: int, column: int, error: ValueError) -> InputError:
    """Return the error for what the parser said about a value of a file."""
    where = f"{place}:line {line}"
    if isinstance(error, json.JSONDecodeError):
        return InputError(where, f"is not valid JSON: {error.msg} at column {column}")
    if isinstance(error, _TwiceError):
        return InputError(where, str(error))
    return InputError(where, "holds a number of too many digits; shorten it or write it as text")


def _too_long(place: str, line: int) -> InputError:
    return InputError(
        f"{place}:line {line}", f"begins a row of more than {MOST_ROW_BYTES >> 20} MiB, or a quote is missing"
    )
