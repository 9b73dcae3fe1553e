"""Owns the files of a checkpoint: their names, and the manifest that tells whether they are whole.

The manifest is written last and holds the SHA-256 of every other file. A folder without one, or whose files
differ from it, is no checkpoint: so a kill at any moment leaves either the whole or nothing.

Refuses to know what files hold. Imports nothing heavy.
"""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from qlora.failpoints import durable

ADAPTER = "adapter"
OPTIMIZER = "optimizer.safetensors"
POSITION = "position.json"
SINCE_REPORT = "since_report.json"  # what a trial did since its last report, if it was stopped in between
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A folder that is not a whole checkpoint."""


def write_manifest(folder: Path) -> None:
    """Make a checkpoint of a folder whose files are all there. Raises OSError."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest = {str(path.relative_to(folder)): _digest(path) for path in files}
    with durable("checkpoint manifest"):
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def verify_checkpoint(folder: Path, below: str = "") -> None:
    """Raise CheckpointError unless every file of the manifest is there, byte for byte.

    `below`: a folder of the checkpoint, of whose files alone that is asked.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} has no readable manifest: it was not finished") from error
    if not isinstance(manifest, dict) or not {OPTIMIZER, POSITION} <= set(manifest):
        raise CheckpointError(f"{folder}: its manifest names too few files")
    for name, digest in manifest.items():
        path = folder / name
        parts = PurePosixPath(name).parts
        is_asked = parts[: len(PurePosixPath(below).parts)] == PurePosixPath(below).parts
        if ".." in parts or not path.is_file() or (is_asked and _digest(path) != digest):
            raise CheckpointError(f"{folder}: {name} is missing or damaged")


def read_position(text: bytes) -> dict[str, Any]:
    """Parse the content of a checkpoint's position. Raises ValueError unless it has a step."""
    try:
        position = json.loads(text)
    except RecursionError:
        raise ValueError("holds no step") from None
    if not isinstance(position, dict) or not isinstance(position.get("step"), int):
        raise ValueError("holds no step")
    return position


def _digest(path: Path) -> str:
    """Return the SHA-256 (hexadecimal) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
