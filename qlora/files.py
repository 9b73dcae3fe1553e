"""Owns reading and writing whole files: a reader sees the old file or the new one, never a part of one.

A file is replaced by writing a neighbour, flushing it to disk and renaming it: POSIX promises that a rename
within a folder is atomic (https://pubs.opengroup.org/onlinepubs/9799919799/functions/rename.html).

Refuses to know what files mean.
"""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from qlora.config import InputError


def write_text(path: Path, text: str) -> None:
    """Replace `path` with the text in one move, and make its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Replace `path` with readable JSON in one move."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


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


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    """Build a mapping as PyYAML does. Raises yaml.MarkedYAMLError at the second of two equal keys."""
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if isinstance(key, str) and key in seen and key_node.tag != "tag:yaml.org,2002:merge":
            raise yaml.MarkedYAMLError(
                problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark
            )
        if isinstance(key, str):
            seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=deep)


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)
