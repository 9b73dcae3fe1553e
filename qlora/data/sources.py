"""Owns opening data: from a place to its rows, whatever format they are kept in.

A place is a local file (`~` is the user's home), a URI that fsspec knows
(https://filesystem-spec.readthedocs.io) or a split of a dataset of the Hugging Face hub,
`hf://datasets/OWNER/NAME[@REVISION]/SPLIT`. What is inside is told by its first bytes, not by its name: a
JSON list, JSON Lines, CSV, Parquet or Arrow, and each of them under gzip.

Refuses to know what a row should hold.
"""

import gzip
import importlib.util
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from qlora.config import InputError
from qlora.data.json_rows import json_rows
from qlora.data.table_rows import arrow_rows, csv_rows, looks_like_csv, parquet_rows

Places = str | Path | Sequence[str | Path]  # several are one set
_FIRST_BYTES = 1 << 12
_piped = dict[str, bytes]()  # what came through pipes, which can be read once: a set is read several times
_GZIP, _PARQUET, _ARROW = b"\x1f\x8b", b"PAR1", (b"ARROW1", b"\xff\xff\xff\xff")
_NO_DATA = {
    **dict.fromkeys((b"PK\x03\x04", b"PK\x05\x06"), "is a zip archive; unpack it"),
    **dict.fromkeys(
        (b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"BZh91AY"), "is packed; unpack it, or pack it by gzip"
    ),
    b"version https://git-lfs": "is a pointer of Git LFS to the file; fetch it with git lfs pull",
}
_SPLIT = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^/]+))?/([\w\[\]:%+-]+)", re.ASCII)


def listed(places: Places) -> list[str]:
    """Return the places of a set as texts."""
    return [str(places)] if isinstance(places, str | Path) else [str(place) for place in places]


def joined(places: Places) -> str:
    """Return the places of a set in one line."""
    return ", ".join(listed(places))


def read_rows(places: Places) -> Iterator[tuple[str, Any]]:
    """Read the rows of a set one by one, each with where it stands: `PLACE:row NUMBER`.

    Raises InputError, naming the place and, where it is known, the line, for what can't be read.
    """
    for place in listed(places):
        for number, row in enumerate(_rows_of(place)):
            yield f"{place}:row {number}", row


def _rows_of(place: str) -> Iterator[Any]:
    """Read the rows of one place."""
    is_uri = "://" in place
    if is_uri and urlsplit(place).password is not None:
        raise InputError("data", "an address holds a password; give it in the environment instead")
    try:
        if split := _SPLIT.fullmatch(place):
            yield from _rows_of_hub(place, *split.groups())
            return
        with _opened(place, is_uri) as file:
            yield from _rows_in(place, file)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(place, "no such file; check the path") from None
    except UnicodeDecodeError:
        raise InputError(place, "is not UTF-8 text; save it as UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise InputError(place, "is a damaged gzip file; make it again") from None
    except OSError as error:
        raise InputError(place, f"can't be read: {error.strerror or error}") from None
    except RecursionError:
        raise InputError(place, "is nested too deeply to be rows") from None
    except Exception as error:
        if not is_uri:
            raise
        raise InputError(place, f"can't be read: {error}") from None  # what a store's own library says


def _opened(place: str, is_uri: bool) -> BinaryIO:
    """Open a place as a file that can be read from its beginning more than once."""
    if place in _piped:
        return io.BytesIO(_piped[place])
    file = _opened_uri(place) if is_uri else open(Path(place).expanduser(), "rb")  # noqa: SIM115
    if file.seekable():
        return cast(BinaryIO, file)
    with file:
        content = file.read()
    if not is_uri:
        _piped[place] = content
    return io.BytesIO(content)


def _opened_uri(place: str) -> Any:
    """Open a URI by fsspec or, where that lacks the library for a store that Arrow knows, by Arrow."""
    import fsspec

    try:
        return fsspec.open(place, "rb").open()
    except ImportError as missing:
        import pyarrow as pa

        try:
            filesystem, path = pa.fs.FileSystem.from_uri(place)
        except (pa.ArrowException, ValueError):
            raise missing from None
        return filesystem.open_input_file(path)


def _rows_in(place: str, file: BinaryIO) -> Iterator[Any]:
    """Read the rows of a file by what its first bytes say it is."""
    start = file.read(_FIRST_BYTES)
    file.seek(0)
    if start.startswith(_GZIP):
        with gzip.open(file) as content:
            yield from _rows_in(place, cast(BinaryIO, content))
    elif start.startswith(_PARQUET):
        yield from parquet_rows(place, file)
    elif start.startswith(_ARROW):
        yield from arrow_rows(place, file)
    elif mend := next((mend for first, mend in _NO_DATA.items() if start.startswith(first)), None):
        raise InputError(place, mend)
    elif looks_like_csv(place, start):
        yield from csv_rows(place, file)
    else:
        yield from json_rows(place, file)


def _rows_of_hub(place: str, name: str, revision: str | None, split: str) -> Iterator[Any]:
    """Read a split of a dataset of the hub, through the library `datasets`."""
    if importlib.util.find_spec("datasets") is None:
        raise InputError(place, "needs the library datasets; pip install '.[datasets]'")
    import datasets

    datasets.disable_progress_bars()
    try:
        yield from datasets.load_dataset(name, revision=revision, split=split)
    except Exception as error:
        raise InputError(place, f"can't be had from the hub: {error}") from None
