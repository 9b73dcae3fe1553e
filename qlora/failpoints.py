"""Owns failpoints: names of every durable write, so that a test can end the process right before or after it.

A sweep that may be killed anywhere has to be tried everywhere, so the places are enumerated: whatever
outlives a process (a rename, an append, a request to the tracking server) is done within `durable(NAME)`.
Nothing happens there unless $QLORA_FAILPOINTS names a folder. Then each passage is counted, over all
processes of this machine, in FOLDER/passed/NAME, and where FOLDER/kill reads `NAME before N` or `NAME after
N`, the process that comes there for the Nth time ends by SIGKILL, as a machine that is taken away ends it.

Refuses to know what is written. Source of the idea: https://www.sqlite.org/testing.html#crash_testing
"""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "QLORA_FAILPOINTS"


@contextmanager
def durable(name: str) -> Iterator[None]:
    """Do a durable write of this name within."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        yield
        return
    count = _count(Path(folder) / "passed" / name)
    _end_here(Path(folder), f"{name} before {count}")
    yield
    _end_here(Path(folder), f"{name} after {count}")


def passages(folder: Path) -> dict[str, int]:
    """Return how often each failpoint was passed, by name, as counted in a folder of $QLORA_FAILPOINTS."""
    return {path.name: path.stat().st_size for path in sorted((folder / "passed").glob("*"))}


def _count(path: Path) -> int:
    """Count a passage; return its number, from 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # other processes count, too
        file.write(b".")
        file.flush()
        return os.fstat(file.fileno()).st_size


def _end_here(folder: Path, place: str) -> None:
    """End the process if a test asks for it at this place; the place is then done with."""
    order = folder / "kill"
    if order.exists() and order.read_text(encoding="utf-8") == place:
        order.rename(folder / "killed")
        os.kill(os.getpid(), signal.SIGKILL)
