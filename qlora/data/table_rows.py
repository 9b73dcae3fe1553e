"""Owns reading tables: rows of CSV as texts, rows of Parquet and Arrow as the values that they hold.

CSV is read by the csv module of Python, which leaves every field as it is written: a column of ids such as
007 stays what it is. Parquet and Arrow are read by pyarrow (https://arrow.apache.org/docs/python), a batch at
a time.

Refuses to know what a row should hold.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from qlora.config import InputError

MOST_ROW_BYTES = 1 << 26
_BATCH_ROWS = 256
_DELIMITERS = (",", "\t", ";")


def looks_like_csv(place: str, start: bytes) -> bool:
    """Tell whether a file that begins with these bytes is CSV: it is no JSON, and its first line has columns.

    One of a single column is told by its suffix.
    """
    text = start.decode("utf-8-sig", errors="ignore").lstrip()
    suffix = PurePosixPath(place.lower().removesuffix(".gz")).suffix
    first_line = text.partition("\n")[0]
    has_columns = any(delimiter in first_line for delimiter in _DELIMITERS)
    return bool(text) and text[0] not in "[{" and (suffix in (".csv", ".tsv") or has_columns)


def csv_rows(place: str, file: BinaryIO) -> Iterator[dict[str, str]]:
    """Read the rows under a header line, with commas, tabs or semicolons between fields.

    Raises InputError, naming the line, for a broken quote and for a row with more or fewer fields than the
    header.
    """
    csv.field_size_limit(MOST_ROW_BYTES)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    first_line = text.readline()
    text.seek(0)
    reader = csv.reader(text, delimiter=max(_DELIMITERS, key=first_line.count), strict=True)
    try:
        header = next(reader, [])
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise InputError(place, f"has more than one column {twice[0]!r}; rename the others")
        for fields in reader:
            if fields and len(fields) != len(header):
                problem = f"has {len(fields)} fields, and the header {len(header)}; mend the row"
                raise InputError(f"{place}:line {reader.line_num}", problem)
            if fields:
                yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise InputError(f"{place}:line {reader.line_num}", f"is not valid CSV: {error}") from None


def parquet_rows(place: str, file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Read the rows of a Parquet file. Raises InputError if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(place, f"is a damaged Parquet file: {error}") from None


def arrow_rows(place: str, file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Read the rows of an Arrow file or stream. Raises InputError if it is damaged."""
    import pyarrow as pa

    try:
        try:
            source = pa.ipc.open_file(file)
            batches = (source.get_batch(number) for number in range(source.num_record_batches))
        except pa.ArrowInvalid:
            file.seek(0)
            batches = iter(pa.ipc.open_stream(file))
        for batch in batches:
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(place, f"is a damaged Arrow file: {error}") from None
