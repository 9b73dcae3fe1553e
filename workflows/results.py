"""Owns places of results as a command works on them: folders and files or, at a URI, copies of them.

Loads nothing heavy where there is no URI. Refuses to know what is kept there.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.config import InputError
from qlora.files import below, split_uri
from qlora.home import RESULTS, check_no_credentials, expanded, home_folder, home_place, is_in_job
from workflows.lock import holds_leases, leased, locked

if TYPE_CHECKING:
    from workflows.mirror import Mirror


STUDIES = "studies"  # the folder of studies among those of sweeps


@dataclass(frozen=True)
class Results:
    """A folder of results.

    path: the folder to work in. place: the path or URI where it is kept.
    """

    path: Path
    place: str
    _mirror: "Mirror | None" = None

    @contextmanager
    def held(self, storage: str | None = None) -> Iterator[None]:
        """Hold the folder, and the place in an object store if one is given, for this process alone, within.

        What another process wrote or removed just before is seen within. Raises InputError if one holds it.
        """
        places = [place for place in (storage, self._mirror and self.place) if place]
        with locked(self.path, *dict.fromkeys(places)):
            if self._mirror is None:
                yield
            else:
                with self._mirror.kept():
                    yield


@contextmanager
def open_results(*names: str, only: Sequence[str] = ()) -> Iterator[Results]:
    """Provide a folder below the home's results, within, that others may work on too until it is held.

    `only`: the names of files that are needed (default: all). Raises InputError for a home that can't be
    read; those that are raised within name the home's own files, not the copy's.
    """
    place = home_place(RESULTS, *names)
    if home_folder() is not None:
        yield Results(Path(place), place)
        return
    with _copy_of(place, Path(RESULTS, *names), only) as mirror:
        yield Results(mirror.folder, place, mirror)


@dataclass(frozen=True)
class Output:
    """An output file.

    path: where to write it. place: the path or URI where it is then. settle: called when it is written, to
    have it there before others are told; raises StoppedError if that can't be.
    """

    path: Path
    place: str
    settle: Callable[[], None] = lambda: None


def output_folder(name: str) -> Path:
    """Return the folder of an output that is one; a job's relative path is taken from the home.

    Raises InputError for a URI, and if the home is at one.
    """
    folder = expanded(name)
    if is_in_job() and "://" not in name and not folder.is_absolute():
        name = home_place(name)
        folder = Path(name)
    if "://" in name:
        raise InputError("--output", f"{name} is no folder of a disk; give an absolute path")
    return folder


@contextmanager
def open_output(name: str, sources: Sequence[str]) -> Iterator[Output]:
    """Provide an output file, and what is kept beside it, for this process alone if it is at a URI, within.

    A job's relative path is taken from the home; of a link, the file is what it leads to. Raises InputError
    for a place that can't be written to, or is one of `sources`.
    """
    name = name if "://" in name else str(expanded(name))
    is_short = "://" not in name and not Path(name).is_absolute()
    place = home_place(name) if is_short and is_in_job() else name
    if "://" not in place:
        path = Path(place)
        yield Output(path.resolve() if path.is_symlink() else path, place)
        return
    check_no_credentials(place, "--output")
    if place in sources:
        raise InputError(place, "is the input too; name another file for the output")
    parent, last = split_uri(place)
    if not last or parent.endswith((":/", ":")):
        raise InputError(place, "names no file; end it in one, such as /outputs.json")
    names = (last, f"{last}.errors.json", f"{last}.meta.json", f".{last}.work")
    copy = _copy_of(parent, Path("output"), names, removes=True)
    with copy as mirror, leased(below(parent, f".{last}.lease")), mirror.kept():
        yield Output(mirror.folder / last, place, mirror.settle)


@contextmanager
def _copy_of(place: str, path: Path, names: Sequence[str] = (), removes: bool = False) -> Iterator["Mirror"]:
    """Provide a copy of a place at a URI, in a temporary folder's `path`, within.

    It stays if it has what could not be sent. InputErrors that are raised within name what is at the place.
    """
    from workflows.mirror import Mirror

    top = Path(tempfile.mkdtemp(prefix="qlora-"))
    folder, mirror = top / path, None
    try:
        mirror = Mirror(place, folder, names, removes, may_write=holds_leases)
        mirror.fetch()
        yield mirror
    except InputError as error:
        if not str(error.where).startswith(str(folder)):
            raise
        name = str(error.where).removeprefix(str(folder)).lstrip("/")
        raise InputError(below(place, *filter(None, [name])), error.problem) from None
    finally:
        if mirror is None or not mirror.has_unsent:
            shutil.rmtree(top, ignore_errors=True)
