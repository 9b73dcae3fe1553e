"""Owns what an output file looks like: a JSON list, JSON Lines or Parquet, as its suffix says.

Rows are written as they come, so that no format holds all of them, and the file takes its place in one move.

Refuses to know where rows come from.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from qlora.data.row_shapes import Id
from qlora.files import replacing, replacing_bytes

AddRow = Callable[[Id, str], None]  # an id, and what was generated for it
_LINES, _PARQUET = (".jsonl", ".ndjson"), ".parquet"
_POINT = "predictions"
_GROUP_ROWS = 4096
_MOST_INT = 1 << 63


def output_file(path: Path, ids: Callable[[], Iterable[Id]]) -> AbstractContextManager[AddRow]:
    """Provide, within, what adds a row {"id", "output"} to the file that takes the place of `path`.

    `ids` returns all ids that will be added, for formats whose columns have a type.
    """
    suffix = path.suffix.lower()
    if suffix == _PARQUET:
        return _parquet(path, ids())
    return _json_lines(path) if suffix in _LINES else _json_list(path)


@contextmanager
def _json_list(path: Path) -> Iterator[AddRow]:
    """Provide what adds a row to an indented JSON list."""
    with replacing(path, _POINT) as file:
        before = "[\n "

        def add(identifier: Id, output: str) -> None:
            nonlocal before
            content = {"id": identifier, "output": output}
            file.write(before + json.dumps(content, ensure_ascii=False, indent=1).replace("\n", "\n "))
            before = ",\n "

        yield add
        file.write("\n]\n")


@contextmanager
def _json_lines(path: Path) -> Iterator[AddRow]:
    """Provide what adds a row as a line of JSON."""
    with replacing(path, _POINT) as file:

        def add(identifier: Id, output: str) -> None:
            file.write(json.dumps({"id": identifier, "output": output}, ensure_ascii=False) + "\n")

        yield add


@contextmanager
def _parquet(path: Path, ids: Iterable[Id]) -> Iterator[AddRow]:
    """Provide what adds a row to a Parquet file. Ids are numbers if all of them are, else texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = _kind(ids)
    as_kind: Callable[[Id], Any] = str if kind == "string" else lambda identifier: identifier
    schema = pa.schema([("id", pa.type_for_alias(kind)), ("output", pa.string())])
    with replacing_bytes(path, _POINT) as file, pq.ParquetWriter(file, schema) as writer:
        rows: list[dict[str, Any]] = []

        def add(identifier: Id, output: str) -> None:
            rows.append({"id": as_kind(identifier), "output": output})
            if len(rows) == _GROUP_ROWS:
                flush()

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(rows, schema))
            rows.clear()

        yield add
        flush()


def _kind(ids: Iterable[Id]) -> str:
    """Return the Arrow type that holds all ids as they are: int64, float64 or string."""
    kinds = {str if isinstance(one, int) and abs(one) >= _MOST_INT else type(one) for one in ids}
    return {int: "int64", float: "float64", str: "string"}[kinds.pop()] if len(kinds) == 1 else "string"
