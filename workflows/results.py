"""Owns places of results as a command works on them: folders and files or, at a URI, copies of them.

Loads nothing heavy where there is no URI. Refuses to know what is kept there.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.config import InputError
from qlora.files import below, split_uri
from qlora.home import HOME, RESULTS, home_folder, home_place, is_in_job
from tracking.credentials import holds_credentials
from workflows.lock import leased, locked, lost_place

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

        What another process wrote just before is seen within. Raises InputError if one holds it.
        """
        places = [place for place in (storage, self._mirror and self.place) if place]
        with locked(self.path, *dict.fromkeys(places)):
            if self._mirror is None:
                yield
                return
            self._mirror.fetch()
            with self._mirror as mirror:
                mirror.keep()
                yield


@contextmanager
def open_results(*names: str, only: Sequence[str] = ("",)) -> Iterator[Results]:
    """Provide a folder below the home's results, within, that others may work on too until it is held.

    `only`: what the names that are needed begin with. Raises InputError for a home that can't be read.
    """
    place = home_place(RESULTS, *names)
    _check_no_credentials(place, HOME)
    if home_folder() is not None:
        yield Results(Path(place), place)
        return
    with _copy_of(place, Path(RESULTS, *names), only) as mirror:
        yield Results(mirror.folder, place, mirror)


@dataclass(frozen=True)
class Output:
    """An output file. path: where to write it. place: the path or URI where it is then."""

    path: Path
    place: str


def output_folder(name: str) -> Path:
    """Return the folder of an output that is one; a job's relative path is taken from the home.

    Raises InputError for a URI, and if the home is at one.
    """
    folder = Path(name).expanduser()
    if is_in_job() and "://" not in name and not folder.is_absolute():
        name = home_place(name)
        folder = Path(name)
    if "://" in name:
        raise InputError("--output", f"{name} is no folder of a disk; give an absolute path")
    return folder


@contextmanager
def open_output(name: str, sources: Sequence[str]) -> Iterator[Output]:
    """Provide an output file, and what is kept beside it, for this process alone if it is at a URI, within.

    A job's relative path is taken from the home. Raises InputError for a place that can't be written to, or
    is one of `sources`.
    """
    is_short = "://" not in name and not Path(name).is_absolute()
    place = home_place(name) if is_short and is_in_job() else name
    if "://" not in place:
        yield Output(Path(place), place)
        return
    _check_no_credentials(place, "--output")
    if place in sources:
        raise InputError(place, "is the input too; name another file for the output")
    parent, last = split_uri(place)
    hidden = f".{last}"
    with (
        _copy_of(parent, Path("output"), (last, hidden), removes=True) as mirror,
        leased(below(parent, f"{hidden}.work")),
    ):
        mirror.fetch()
        with mirror:
            mirror.keep()
            yield Output(mirror.folder / last, place)


def _check_no_credentials(place: str, where: str) -> None:
    """Raise InputError for an address that would tell secrets on the screen and in runs."""
    if holds_credentials(place):
        problem = "holds a name, a password or a key; give them in the environment of all nodes"
        raise InputError(where, problem)


@contextmanager
def _copy_of(place: str, path: Path, begins_with: Sequence[str], removes: bool = False) -> Iterator["Mirror"]:
    """Provide a copy of a place at a URI, in a temporary folder's `path`, within; it stays if it has more."""
    from workflows.mirror import Mirror

    top = Path(tempfile.mkdtemp(prefix="qlora-"))
    mirror = None
    try:
        mirror = Mirror(place, top / path, begins_with, removes, may_write=lambda: lost_place() is None)
        mirror.fetch()
        yield mirror
    finally:
        if mirror is None or mirror.is_equal:
            shutil.rmtree(top, ignore_errors=True)
