"""Owns the files of a checkpoint: their names, and the manifest that tells whether they are whole.

The manifest is written last and holds the SHA-256 of every other file, or of its pieces if it is large. A
folder without one, or whose files differ from it, is no checkpoint: so a kill at any moment leaves either the
whole or nothing.

Refuses to know what files hold. Imports nothing heavy.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from qlora.failpoints import durable

ADAPTER = "adapter"
OPTIMIZER = "optimizer.safetensors"
POSITION = "position.json"
SINCE_REPORT = "since_report.json"  # what a trial did since its last report, if it was stopped in between
MANIFEST = "manifest.json"
_PIECE_BYTES, _READ_BYTES = 1 << 26, 1 << 20
_PIECES = "sha256 of 64-MiB pieces' sha256: "  # how the digest of a large file begins
_MOST_THREADS = 8


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
        if ".." in parts or not path.is_file() or (is_asked and not _has_digest(path, digest)):
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
    """Return what tells a file's content: its SHA-256 (hexadecimal), or that of its pieces if it is large."""
    return _digest_of_pieces(path) if path.stat().st_size > _PIECE_BYTES else _digest_of_whole(path)


def _has_digest(path: Path, digest: Any) -> bool:
    """Tell whether a file has the content that a digest was taken of."""
    taken = _digest_of_pieces if str(digest).startswith(_PIECES) else _digest_of_whole
    return taken(path) == digest


def _digest_of_whole(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_pieces(path: Path) -> str:
    """Return the SHA-256 of the pieces' own ones, one behind the other; threads work these out.

    A processor hashes about a gigabyte a second, and the optimizer's file of a 7B adapter may have 2.5 GB.
    """
    starts = range(0, path.stat().st_size, _PIECE_BYTES)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        digests = pool.map(partial(_digest_of_piece, path), starts)
        return _PIECES + hashlib.sha256(b"".join(digests)).hexdigest()


def _digest_of_piece(path: Path, start: int) -> bytes:
    found, left = hashlib.sha256(), _PIECE_BYTES
    with open(path, "rb") as file:
        file.seek(start)
        while left > 0 and (block := file.read(min(left, _READ_BYTES))):
            found.update(block)
            left -= len(block)
    return found.digest()
