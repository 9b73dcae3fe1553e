"""Owns what is found before work starts: places that take no file, names and paths that are too long.

Imports nothing heavy. Refuses to know any command.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qlora.config import InputError
from qlora.files import disk_without_space
from tracking.address import registry_uri, sqlite_file, tracking_uri

_PROBE_BYTES = 1 << 20
_LONGEST_TEMPORARY = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
_LONGEST_ADDITION = len("." + ".errors.json" + ".4194304.part")  # to a name, of a file beside an output
_RAYS_OWN_TEMPORARY = Path("/tmp")  # where Ray goes by itself


def check_writable(*folders: Path) -> None:
    """Raise InputError for a folder, or the nearest there is above it, that takes no new file.

    Found before work starts: a disk without space, one that is mounted for reading only, another's folder.
    """
    for folder in folders:
        there = _nearest(folder)
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
        except OSError as error:
            mend = "free some space" if disk_without_space(error) else "mend that, or use another place"
            raise InputError(there, f"can't be written to ({error.strerror}); {mend}") from None


def check_room(place: str, needed_bytes: int) -> None:
    """Raise InputError for a folder on a disk with less free space than it is about to need.

    What is in it already counts as needed. `place`: a path, or a URI, of which nothing is known.
    """
    if "://" in place:
        return
    there = sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
    free = shutil.disk_usage(_nearest(Path(place))).free
    if free + there < needed_bytes:
        room = (
            f"{needed_bytes / 2**30:.1f} GiB of checkpoints are to come, but {free / 2**30:.1f} GiB are free"
        )
        raise InputError(
            place, f"{room}; free some, keep them elsewhere (--set storage=...), or take fewer trials"
        )


def check_output(path: Path, sources: Sequence[str] = ()) -> None:
    """Raise InputError for a file that can't be written in the end.

    That is one of `sources`, a folder, a name too long for the files beside it that it is written by, and
    what `check_writable` finds.
    """
    if any(Path(source).expanduser().resolve() == path.resolve() for source in sources):
        raise InputError(path, "is the input too; name another file for the output")
    longest = os.pathconf(_nearest(path.parent), "PC_NAME_MAX") - _LONGEST_ADDITION
    if len(os.fsencode(path.name)) > longest:
        raise InputError(path, f"has too long a name for the files beside it; use at most {longest} bytes")
    if path.is_dir():
        raise InputError(path, "is a folder; name a file")
    check_writable(path.parent)


def store_folders() -> list[Path]:
    """Return the folders of stores that are files. Raises InputError if there can be no store."""
    files = [sqlite_file(uri) for uri in dict.fromkeys((tracking_uri(), registry_uri()))]
    return [file.parent for file in files if file]


def check_temporary_folder() -> None:
    """Raise InputError for a temporary folder that takes no file, or whose path a local Ray can't use.

    Ray's sockets lie below it, and a socket's path has at most 107 bytes.
    """
    try:
        check_writable(Path(tempfile.gettempdir()))
    except FileNotFoundError as error:  # Python tries several
        raise InputError("TMPDIR", f"{error.strerror}; free some space, or set it") from None
    if os.environ.get("RAY_ADDRESS"):
        return
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "")
    folder = Path(os.environ[name]).absolute() if name else _RAYS_OWN_TEMPORARY
    if len(os.fsencode(folder)) > _LONGEST_TEMPORARY:
        raise InputError(
            name,
            f"{folder} is too long a path for Ray's sockets; "
            f"set RAY_TMPDIR to a folder with a path of at most {_LONGEST_TEMPORARY} bytes",
        )
    check_writable(folder)


def _nearest(path: Path) -> Path:
    """Return a path, or the nearest above it, that is there."""
    return next(one for one in (path, *path.absolute().parents) if os.access(one, os.F_OK))
