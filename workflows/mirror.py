"""Owns copies of what is kept at a URI: a folder to work in, and the place there kept equal to it.

    with Mirror("s3://bucket/home/results/NAME", folder) as mirror:
        mirror.fetch()   # what is there comes here
        mirror.keep()    # what is written here goes there from now on, once a second; the rest at the end

Whatever is written goes there in the order of `last`: a file that says that others are whole comes after
them. So what a kill leaves there is what it would have left in a folder some moments earlier. Hidden files of
writers, locks and Ray's own checkpoints, which go to the storage themselves, stay out.

Refuses to know what the files are.
"""

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileType

from qlora.config import InputError, first_line
from workflows.session import StoppedError

LAST = ("study.json", "sweep.json", "summary.json")  # each says that what was written before it is whole
_OUT = re.compile(r"(^|/)(\.lock|lock|lease|lease-probe|\.reach[^/]*|\.[^/]*\.part)(/|$)")
_RAY = "ray"
_SECONDS, _MOST_BUSY, _THREADS, _CHUNK_BYTES = 1.0, 20, 16, 1 << 22


class Mirror:
    """A folder and the place at a URI that is kept equal to it.

    begins_with: of the names, directly below both, that belong to it; the others are left alone.
    removes: whether such a name that is gone from the folder goes from the place as well.
    may_write: asked before anything is written there.
    """

    def __init__(
        self,
        place: str,
        folder: Path,
        begins_with: Sequence[str] = ("",),
        removes: bool = False,
        may_write: Callable[[], bool] = lambda: True,
    ):
        """Find the place. Raises InputError if there can be none."""
        from tuning.checkpoints import Storage

        self.place, self.folder = place, folder
        self._begins_with, self._removes, self._may_write = tuple(begins_with), removes, may_write
        self._there: dict[str, tuple[int, int]] = {}  # size and time of what was fetched, as they are there
        self._here: dict[str, tuple[int, int]] = {}  # and of what was fetched or sent, as they are here
        self._ended, self._sending = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._folders: set[str] = set()  # that are there
        self.is_equal = True  # false once it had to be left with less there than here
        with asking(place, "can't be reached"):
            storage = Storage.at(place)
        self._filesystem, self._path = storage.filesystem, storage.path

    def fetch(self) -> None:
        """Bring here what is there and changed since it was last fetched.

        Raises InputError if it can't be.
        """
        with asking(self.place, "can't be read"):
            found = list(self._listed())
            changed = [(name, stamp) for name, stamp in found if self._there.get(name) != stamp]
            with ThreadPoolExecutor(_THREADS) as threads:
                for _ in threads.map(self._fetch_one, [name for name, _ in changed]):
                    pass
        self._there.update(changed)

    def keep(self) -> None:
        """Send what changes here, in a thread of its own, until the end."""
        self._thread = threading.Thread(target=self._send_on, name="mirror", daemon=True)
        self._thread.start()

    def send(self) -> None:
        """Send now what changed here. Raises OSError or ArrowException if it can't be."""
        with self._sending:
            if not self._may_write():
                return
            here = dict(self._files())
            names = [name for name, stamp in here.items() if self._here.get(name) != stamp]
            for name in sorted(names, key=lambda name: (LAST.index(name) + 1 if name in LAST else 0, name)):
                try:
                    file = open(self.folder / name, "rb")  # noqa: SIM115
                except FileNotFoundError:
                    continue  # its writer has moved it meanwhile
                with file:
                    self._write(name, file)
                self._here[name] = here[name]
            if self._removes:
                self._remove_gone()

    def __enter__(self) -> "Mirror":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send the rest, if anything is kept. Raises StoppedError if it can't be."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            try:
                self.send()
            except (OSError, ArrowException) as problem:
                self.is_equal = False
                why = f"can't be written to ({first_line(problem)})"
                raise StoppedError(f"{self.place} {why}; what it lacks is in {self.folder}") from error

    def _send_on(self) -> None:
        pause = _SECONDS
        while not self._ended.wait(pause):
            began = time.monotonic()
            with suppress(OSError, ArrowException):  # away for a moment: tried again, and told at the end
                self.send()
            pause = max(_SECONDS, _MOST_BUSY * (time.monotonic() - began))

    def _files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            try:
                if self._is_mine(name) and path.is_file():
                    stat = path.stat()
                    yield name, (stat.st_size, stat.st_mtime_ns)
            except FileNotFoundError:
                continue

    def _listed(self) -> Iterator[tuple[str, tuple[int, int]]]:
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
        return first != _RAY and first.startswith(self._begins_with) and not _OUT.search(name)

    def _fetch_one(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._filesystem.open_input_stream(f"{self._path}/{name}") as file, open(path, "wb") as copy:
            shutil.copyfileobj(file, copy, _CHUNK_BYTES)
        stat = path.stat()
        self._here[name] = (stat.st_size, stat.st_mtime_ns)

    def _write(self, name: str, content: BinaryIO) -> None:
        path = f"{self._path}/{name}"
        parent = path.rpartition("/")[0]
        if parent not in self._folders:
            self._filesystem.create_dir(parent, recursive=True)
            self._folders.add(parent)
        with self._filesystem.open_output_stream(path) as file:
            shutil.copyfileobj(content, file, _CHUNK_BYTES)

    def _remove_gone(self) -> None:
        for first in {name.partition("/")[0] for name in self._here}:
            if (self.folder / first).exists():
                continue
            path = f"{self._path}/{first}"
            if self._filesystem.get_file_info(path).type == FileType.Directory:
                self._filesystem.delete_dir(path)
            elif self._filesystem.get_file_info(path).type == FileType.File:
                self._filesystem.delete_file(path)
            self._here = {name: at for name, at in self._here.items() if name.partition("/")[0] != first}


@contextmanager
def asking(place: str, problem: str) -> Iterator[None]:
    """Turn errors of a store, within, into an InputError that says what can't be done at a place."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ArrowException) as error:
        raise InputError(place, f"{problem} ({first_line(error)})") from None
