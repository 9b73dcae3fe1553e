"""Owns writing files whole: a reader sees the old file or the new one, never a part."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace `path` with the text in one move, making its folder if need be."""
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
