"""Owns reading and writing whole files: a reader sees the old file or the new one, never a part of one.

A file is replaced by writing a neighbour, flushing it to disk and renaming it: POSIX promises that a rename
within a folder is atomic (https://pubs.opengroup.org/onlinepubs/9799919799/functions/rename.html).

Refuses to know what files mean.
"""

import errno
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import yaml

from qlora.config import InputError
from qlora.failpoints import durable

_UNFINISHED = ".part"
_SMALL_BYTES = 1 << 20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE_WORDS = ("No space left on device", "Disk quota exceeded", "database or disk is full")
_FULL_PLACE = re.compile(rf"(?:{'|'.join(_NO_SPACE_WORDS)}): '([^'\n]+)'")


def below(place: str, *names: str) -> str:
    """Return the path or URI of what is below another one; a URI's query stays last."""
    path, mark, query = place.partition("?") if "://" in place else (place, "", "")
    return "/".join([path.rstrip("/"), *names]) + mark + query


def split_uri(place: str) -> tuple[str, str]:
    """Return what a URI is below, whose query stays last, and the name that it ends in."""
    path, mark, query = place.partition("?")
    parent, _, name = path.rpartition("/")
    return parent + mark + query, name


def write_text(path: Path, text: str, point: str | None = None) -> None:
    """Replace `path` with the text in one move, and make its folder if there is none.

    `point` names it among failpoints (qlora.failpoints); by default its file name does. Raises OSError, and
    leaves nothing unfinished behind.
    """
    with replacing(path, point) as file:
        file.write(text)


@contextmanager
def replacing(path: Path, point: str | None = None) -> Iterator[TextIO]:
    """Provide a text file, within, that takes the place of `path` in one move at the end."""
    with replacing_bytes(path, point) as file:
        text = io.TextIOWrapper(file, encoding="utf-8")
        yield text
        text.detach()  # which writes what it holds; the file is closed by who opened it


@contextmanager
def replacing_bytes(path: Path, point: str | None = None) -> Iterator[BinaryIO]:
    """Provide a file for bytes, within, that takes the place of `path` in one move at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{_UNFINISHED}")
    try:
        with durable(f"write {point or path.name}"), open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with durable(f"rename {point or path.name}"):
            unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left half written in a folder and those below it, files and folders.

    Only for a folder that no other process writes to.
    """
    for path in list(folder.rglob(f".*{_UNFINISHED}")):
        with durable("unfinished removed"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def write_json(path: Path, content: Any, point: str | None = None) -> None:
    """Replace `path` with readable JSON in one move; `point` is that of `write_text`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", point)


def disk_without_space(error: BaseException | None) -> str | None:
    """Return which place is full if an error, or what it was raised from, says so; None for any other."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE and error.filename:
            return str(error.filename2 or error.filename)  # of a copy, the target
        text = str(error)
        if any(words in text for words in _NO_SPACE_WORDS):  # other processes' errors come as text
            found = _FULL_PLACE.search(text)
            return found[1] if found else "a disk that this work writes to"
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


def is_full(place: Path) -> bool:
    """Tell whether the disk of a file or folder, or of where it is to be, has no space for a small file."""
    there = next(path for path in (place, *place.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free < _SMALL_BYTES


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """Read a JSON object that `write_json` wrote.

    Raises FileNotFoundError; InputError, with `mend` at its end, for a file that is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(path, f"is damaged ({error}); {mend}") from None
    if not isinstance(content, dict):
        raise InputError(path, f"is damaged (it holds no JSON object); {mend}")
    return content


def read_yaml(path: Path, missing: str) -> dict[str, Any]:
    """Read the mapping of a YAML file.

    Raises InputError if there is no such file (with `missing` as its text), if the content is no YAML
    mapping, and if a key stands twice.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        raise InputError(path, missing) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise InputError(
            f"{path}:line {line}", f"is not valid YAML: {error.problem or error.context}"
        ) from None
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise InputError(path, f"can't be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(path, "must be a YAML mapping of keys to values")
    return content


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, made to refuse a key that stands twice: PyYAML itself keeps the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping, before others are merged into it. Raises yaml.MarkedYAMLError at an equal key."""
        node = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node
