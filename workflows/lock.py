"""Owns that one process at a time works on a folder of results, or on a sweep's place in an object store.

A folder is locked by the kernel, so that the lock ends with its process, however that ends. An object store
has no locks: there, an object that its holder rewrites tells that it is held, and who finds it older than a
time limit takes it. Ages are told by the store's clock alone, so that clocks of machines may differ and jump.
A holder that could not rewrite it for so long finds another's there, and has to end its work (`lost_place`).

Refuses to know what the work is.
"""

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora.config import InputError
from qlora.failpoints import durable

_LOCK, _LEASE, _PROBE = ".lock", "lease", "lease-probe"
_HELD = "is being worked on by another process; wait for it, or choose another --name"
_LEASE_SECONDS, _RENEWAL_SECONDS, _SETTLING_SECONDS = 60.0, 15.0, 2.0
_lost: list[str] = []


@contextmanager
def locked(folder: Path, storage: str | None = None) -> Iterator[None]:
    """Hold a folder, which is made if need be, and the place in an object store if one is given, within.

    A folder in which nothing was written is removed again. Raises InputError if another process holds either.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / _LOCK, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(folder, _HELD) from None
            path = folder / _LOCK
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(lock.fileno())):
                raise InputError(folder, _HELD)  # its holder, which wrote nothing, has just removed it
            if storage is None:
                yield
            else:
                with _leased(storage):
                    yield
    finally:
        if is_new and [path.name for path in folder.iterdir()] == [_LOCK]:
            (folder / _LOCK).unlink()
            folder.rmdir()


@contextmanager
def _leased(storage: str) -> Iterator[None]:
    """Hold a place in an object store, within.

    Raises InputError if another process holds it, and if it can't be written to.
    """
    from pyarrow import ArrowException

    from tuning.checkpoints import Storage

    mine, ended = secrets.token_hex(16), threading.Event()
    try:
        place = Storage.at(storage)
        place.filesystem.create_dir(place.path)
        if (age := _age(place)) is not None and age < _LEASE_SECONDS:
            wait = round(_LEASE_SECONDS - age)
            problem = f"is being worked on by another process; if that has ended, try again in {wait} s"
            raise InputError(storage, problem)
        _write(place, _LEASE, mine)
        time.sleep(_SETTLING_SECONDS)  # who came at the same time has written by now
        if _read(place) != mine:
            raise InputError(storage, "is being worked on by another process that started at the same time")
    except (OSError, ValueError, ArrowException) as error:
        if isinstance(error, InputError):
            raise
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise InputError(storage, f"can't be written to ({reason}); mend that, or set storage") from None

    def renew() -> None:
        while not ended.wait(_RENEWAL_SECONDS):
            with suppress(OSError):  # away for a moment; there is time for three more
                if _read(place) != mine:
                    _lost.append(storage)
                    return
                _write(place, _LEASE, mine)

    threading.Thread(target=renew, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        _lost.clear()
        with suppress(OSError):
            if _read(place) == mine:
                with durable("lease removed"):
                    place.filesystem.delete_file(f"{place.path}/{_LEASE}")


def lost_place() -> str | None:
    """Return the place in an object store that another process took from this one; None if it holds all."""
    return _lost[0] if _lost else None


def _age(place: Any) -> float | None:
    """Return the age of a lease in seconds by the store's clock; None if there is none."""
    before = place.filesystem.get_file_info(f"{place.path}/{_LEASE}")
    if before.mtime_ns is None:
        return None
    _write(place, _PROBE, "")
    now = place.filesystem.get_file_info(f"{place.path}/{_PROBE}")
    return float(now.mtime_ns - before.mtime_ns) / 1e9


def _write(place: Any, name: str, text: str) -> None:
    with durable(name), place.filesystem.open_output_stream(f"{place.path}/{name}") as file:
        file.write(text.encode())


def _read(place: Any) -> str:
    with place.filesystem.open_input_stream(f"{place.path}/{_LEASE}") as file:
        return bytes(file.read()).decode()
