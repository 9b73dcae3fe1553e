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
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from qlora.config import InputError, first_line
from qlora.failpoints import durable

_LOCK, _LEASE, _PROBE = ".lock", "lease", "lease-probe"
_HELD = "is being worked on by another process; wait for it, or choose another --name"
_GLANCE_SECONDS = 0.05
_LEASE_SECONDS, _RENEWAL_SECONDS, _SETTLING_SECONDS = 60.0, 15.0, 2.0
_lost: list[str] = []
_renewed: dict[str, float] = {}  # when the lease of a place was last known to be this process's


@contextmanager
def locked(folder: Path, *places: str) -> Iterator[None]:
    """Hold a folder, which is made if need be, and places in object stores if some are given, within.

    A folder in which nothing was written is removed again. Raises InputError if another process holds one.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / _LOCK, "a") as lock:
            if not _takes(lock, fcntl.LOCK_EX):
                time.sleep(_GLANCE_SECONDS)  # it may be looked at, which takes an instant
                if not _takes(lock, fcntl.LOCK_EX):
                    raise InputError(folder, _HELD)
            path = folder / _LOCK
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(lock.fileno())):
                raise InputError(folder, _HELD)  # its holder, which wrote nothing, has just removed it
            with ExitStack() as leases:
                for place in places:
                    leases.enter_context(leased(place))
                yield
    finally:
        if is_new and [path.name for path in folder.iterdir()] == [_LOCK]:
            (folder / _LOCK).unlink()
            folder.rmdir()


def is_held(folder: Path) -> bool:
    """Tell whether a process of this machine holds a folder."""
    try:
        with open(folder / _LOCK, "rb") as lock:
            return not _takes(lock, fcntl.LOCK_SH)
    except OSError:
        return False


def _takes(lock: IO[Any], how: int) -> bool:
    """Take a lock on an open file, unless another has one that allows of no further one; tell which."""
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def leased(storage: str) -> Iterator[None]:
    """Hold a place in an object store, within.

    Raises InputError if another process holds it, and if it can't be written to.
    """
    from pyarrow import ArrowException

    from tuning.checkpoints import Storage

    mine, ended = secrets.token_hex(16), threading.Event()
    try:
        place = Storage.at(storage)
        place.filesystem.create_dir(place.path)
        _wait_for_end(place, storage)
        _write(place, _LEASE, mine)
        time.sleep(_SETTLING_SECONDS)  # who came at the same time has written by now
        if _read(place) != mine:
            raise InputError(storage, "is being worked on by another process that started at the same time")
    except (OSError, ValueError, ArrowException) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            storage, f"can't be written to ({first_line(error)}); mend that, or name another place"
        ) from None

    def renew() -> None:
        while not ended.wait(_RENEWAL_SECONDS):
            with suppress(OSError, ArrowException):  # away for a moment; there is time for three more
                if _holder(place) != mine:  # another's, or of one that took it and has ended since
                    _lost.append(storage)
                    return
                _write(place, _LEASE, mine)
                _renewed[storage] = _clock()

    _renewed[storage] = _clock()
    threading.Thread(target=renew, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        _lost.clear()
        _renewed.pop(storage, None)
        with suppress(OSError):
            if _read(place) == mine:
                with durable("lease removed"):
                    place.filesystem.delete_file(f"{place.path}/{_LEASE}")
                _remove_if_empty(place)


def _wait_for_end(place: Any, storage: str) -> None:
    """Wait until a lease that is there runs out or is given back.

    Raises InputError once its holder renews it. One that was killed renews nothing.
    """
    age, found = _age(place), _written(place)
    if age is None or age >= _LEASE_SECONDS:
        return
    seconds = _LEASE_SECONDS - age
    end = time.monotonic() + seconds
    print(f"waiting     {seconds:.0f} s at most, to see whether {storage} is worked on", flush=True)
    while time.monotonic() < end:
        time.sleep(_SETTLING_SECONDS)
        if (now := _written(place)) is None:
            return
        if now != found:
            raise InputError(storage, "is being worked on by another process; wait for it")


def _remove_if_empty(place: Any) -> None:
    """Remove a place in which nothing was written but what told its age."""
    with suppress(FileNotFoundError):
        place.filesystem.delete_file(f"{place.path}/{_PROBE}")
    if place.filesystem.type_name == "local":  # elsewhere folders are names alone
        with suppress(OSError):
            Path(place.path).rmdir()


def lost_place() -> str | None:
    """Return the place in an object store that another process took from this one; None if it holds all."""
    return _lost[0] if _lost else None


def holds_leases() -> bool:
    """Tell whether all leases are this process's own for sure; after a sleep they may be another's."""
    return not _lost and all(_clock() - since < _LEASE_SECONDS for since in _renewed.values())


def _clock() -> float:
    """Return seconds that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _age(place: Any) -> float | None:
    """Return the age of a lease in seconds by the store's clock; None if there is none."""
    if (before := _written(place)) is None:
        return None
    _write(place, _PROBE, "")
    now = place.filesystem.get_file_info(f"{place.path}/{_PROBE}")
    return float(now.mtime_ns - before) / 1e9


def _written(place: Any) -> int | None:
    """Return when a lease was last written, in nanoseconds of the store's clock; None if there is none."""
    found: int | None = place.filesystem.get_file_info(f"{place.path}/{_LEASE}").mtime_ns
    return found


def _write(place: Any, name: str, text: str) -> None:
    with durable(name), place.filesystem.open_output_stream(f"{place.path}/{name}") as file:
        file.write(text.encode())


def _read(place: Any) -> str:
    with place.filesystem.open_input_stream(f"{place.path}/{_LEASE}") as file:
        return bytes(file.read()).decode()


def _holder(place: Any) -> str | None:
    """Return what a lease says; None if there is none."""
    try:
        return _read(place)
    except FileNotFoundError:
        return None
