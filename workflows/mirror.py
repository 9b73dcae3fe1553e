"""Owns copies of what is kept at a URI: a folder to work in, and the place there kept equal to it.

    mirror = Mirror("s3://bucket/home/results/NAME", folder)
    mirror.fetch()          # what is there comes here
    with mirror.kept():     # what is written here goes there, looked at once a second; the rest at the end
        ...

Whatever is written goes there in the order of `last`: a file that says that others are whole comes after
them. So what a kill leaves there is what it would have left in a folder some moments earlier. Hidden files of
writers, locks and Ray's own checkpoints, which go to the storage themselves, stay out.

Refuses to know what the files are.
"""

import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileType

from qlora.config import InputError, first_line
from workflows import stopping
from workflows.session import StoppedError

LAST = ("study.json", "sweep.json", "summary.json")  # each says that what was written before it is whole
_UNFINISHED = re.compile(r"(^|/)\.[^/]*\.part(/|$)|\.work/lock$")
_NOT_RESULTS = ("ray", ".lock", "lease", "lease-probe")
_OBJECT_STORES = ("s3", "gcs", "abfs")  # in which a file is there when it is whole, and not before
_SECONDS, _THREADS, _CHUNK_BYTES = 1.0, 16, 1 << 22
_TRIES = 5  # to send what has to be there
_MOST_BUSY = 20  # a file is sent again after so many times the seconds that it took
_Stamp = tuple[int, int]  # size in bytes, time in nanoseconds


class Mirror:
    """A folder and the place at a URI that is kept equal to it.

    names: of the files and folders, directly below both, that belong to it (default: all that are results).
    removes: whether such a name that is gone from the folder goes from the place as well.
    may_write: asked before anything is written there.
    has_unsent: whether the folder may hold what the place lacks.
    """

    def __init__(
        self,
        place: str,
        folder: Path,
        names: Sequence[str] = (),
        removes: bool = False,
        may_write: Callable[[], bool] = lambda: True,
    ):
        """Find the place. Raises InputError if there can be none."""
        from tuning.checkpoints import Storage

        self.place, self.folder, self.has_unsent = place, folder, False
        self._names, self._removes, self._may_write = tuple(names), removes, may_write
        self._there: dict[str, _Stamp] = {}  # what was fetched, as it is there
        self._here: dict[str, _Stamp] = {}  # what was fetched or sent, as it was here
        self._not_before: dict[str, float] = {}  # when a file that takes long may be sent again
        self._folders: set[str] = set()  # that are there
        self._ended, self._is_open, self._sending = threading.Event(), True, threading.Lock()
        self._failure: Exception | None = None
        with asking(place, "can't be reached"):
            storage = Storage.at(place)
        self._filesystem, self._path = storage.filesystem, storage.path

    def fetch(self) -> None:
        """Bring here what is there and changed since it was last fetched; remove here what was removed there.

        Raises InputError if it can't be.
        """
        with asking(self.place, "can't be read"):
            found = dict(self._listed())
            changed = [name for name, stamp in found.items() if self._there.get(name) != stamp]
            with ThreadPoolExecutor(_THREADS) as threads:
                list(threads.map(self._fetch_one, changed))
        for name in set(self._there) - set(found):
            (self.folder / name).unlink(missing_ok=True)
            self._here.pop(name, None)
        self._there = found

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Fetch, and then send what changes here, within; the rest at the end, whatever ends it.

        Raises StoppedError if the rest can't be sent, unless an error is on its way already.
        """
        self.fetch()
        self.has_unsent = True
        thread = threading.Thread(target=self._send_on, name="mirror", daemon=True)
        thread.start()
        try:
            try:
                yield
            except BaseException as error:
                if problem := self._end(thread):
                    if isinstance(error, KeyboardInterrupt):
                        raise StoppedError(problem) from error
                    print(problem, file=sys.stderr, flush=True)
                raise
            if problem := self._end(thread):
                raise StoppedError(problem)
        finally:
            self._is_open = False  # nothing is written once the place is another's to take

    def settle(self) -> None:
        """Have all that is here at the place, now. Raises StoppedError if it can't be within some tries."""
        for left in reversed(range(_TRIES)):
            try:
                self._send_all()
                return
            except (OSError, ArrowException) as error:
                if not left:
                    raise StoppedError(f"{self.place} can't be written to ({first_line(error)})") from error
                time.sleep(_SECONDS)

    def send(self, is_last: bool = False) -> None:
        """Send now what changed here, all of it if `is_last`.

        Raises OSError or ArrowException if it can't be.
        """
        with self._sending:
            self._send(is_last)

    def _send(self, is_last: bool) -> None:
        gone = self._gone() if self._removes else set()  # looked at first: what took its place is in the scan
        changed, now = self._changed(), time.monotonic()
        names = [name for name in changed if is_last or self._not_before.get(name, 0) <= now]
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(lambda name: self._send_one(name, changed[name]), set(names) - set(LAST)))
        if len(names) < len(changed):
            return
        for name in LAST:
            if name in changed:
                self._send_one(name, changed[name])
        for first in gone:
            self._remove(first)

    def _changed(self) -> dict[str, _Stamp]:
        return {name: stamp for name, stamp in self._files() if self._here.get(name) != stamp}

    def _end(self, thread: threading.Thread) -> str:
        """Have the rest sent, which a signal does not break off; say why it could not be, or nothing."""
        with stopping.held_back():
            self._ended.set()
            thread.join()
        if self._failure is None:
            return ""
        why = f"{self.place} can't be written to ({first_line(self._failure)})"
        return f"{why}; what it lacks is in {self.folder}"

    def _send_on(self) -> None:
        try:
            while not self._ended.wait(_SECONDS):
                with suppress(OSError, ArrowException):  # away for a moment: tried again, and told at the end
                    if self._is_open and self._may_write():
                        self.send()
            self._send_all()
            self.has_unsent = False
        except Exception as error:
            self._failure = error

    def _send_all(self) -> None:
        if self._is_open and self._may_write():
            self.send(is_last=True)
        elif self._changed():
            raise OSError("it was not reached for a while, in which another process may have taken it")

    def _files(self) -> Iterator[tuple[str, _Stamp]]:
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            try:
                if self._is_mine(name) and path.is_file():
                    yield name, _stamp(path)
            except FileNotFoundError:
                continue

    def _listed(self) -> Iterator[tuple[str, _Stamp]]:
        """Yield what is there, without looking into Ray's own folder, which may hold very much."""
        for info in self._infos(self._path, recursive=False):
            name = self._name(info)
            if not self._is_mine(name):
                continue
            inner = self._infos(info.path, recursive=True) if info.type == FileType.Directory else [info]
            for one in inner:
                if one.type == FileType.File and self._is_mine(self._name(one)):
                    yield self._name(one), (one.size, one.mtime_ns or 0)

    def _infos(self, path: str, recursive: bool) -> list[Any]:
        selector = FileSelector(path, recursive=recursive, allow_not_found=True)
        return list(self._filesystem.get_file_info(selector))

    def _name(self, info: Any) -> str:
        return str(info.path).removeprefix(self._path).strip("/")

    def _is_mine(self, name: str) -> bool:
        first = name.partition("/")[0]
        if self._names:
            is_own = first in self._names
        else:
            is_own = first not in _NOT_RESULTS and not first.startswith(".reach")
        return is_own and not _UNFINISHED.search(name)

    def _fetch_one(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._filesystem.open_input_stream(f"{self._path}/{name}") as file, open(path, "wb") as copy:
            shutil.copyfileobj(file, copy, _CHUNK_BYTES)
        self._here[name] = _stamp(path)

    def _send_one(self, name: str, stamp: _Stamp) -> None:
        began = time.monotonic()
        try:
            file = open(self.folder / name, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return  # its writer has moved it meanwhile
        with file:
            self._write(name, file)
        self._here[name] = stamp
        now = time.monotonic()
        self._not_before[name] = now + _MOST_BUSY * (now - began - _SECONDS)

    def _write(self, name: str, content: BinaryIO) -> None:
        path = f"{self._path}/{name}"
        parent, _, last = path.rpartition("/")
        is_whole_at_once = self._filesystem.type_name in _OBJECT_STORES
        if parent not in self._folders:
            self._filesystem.create_dir(parent, recursive=True)
            self._folders.add(parent)
        target = path if is_whole_at_once else f"{parent}/.{last}.part"
        with self._filesystem.open_output_stream(target) as file:
            shutil.copyfileobj(content, file, _CHUNK_BYTES)
        if not is_whole_at_once:
            self._filesystem.move(target, path)

    def _gone(self) -> set[str]:
        """Return the names, directly below the folder, that were sent and are gone from it."""
        if not self.folder.is_dir():
            return set()
        return {first for first in map(_first, self._here) if not (self.folder / first).exists()}

    def _remove(self, first: str) -> None:
        path = f"{self._path}/{first}"
        kind = self._filesystem.get_file_info(path).type
        if kind == FileType.Directory:
            self._filesystem.delete_dir(path)
        elif kind == FileType.File:
            self._filesystem.delete_file(path)
        self._folders = {one for one in self._folders if one != path and not one.startswith(f"{path}/")}
        self._here = {name: stamp for name, stamp in self._here.items() if _first(name) != first}


def _first(name: str) -> str:
    return name.partition("/")[0]


def _stamp(path: Path) -> _Stamp:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@contextmanager
def asking(place: str, problem: str) -> Iterator[None]:
    """Turn errors of a store, within, into an InputError that says what can't be done at a place."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ArrowException) as error:
        raise InputError(place, f"{problem} ({first_line(error)})") from None
