"""Owns failpoints: names of every durable write, so that a test can end the process right before or after it.

A sweep that may be killed anywhere has to be tried everywhere, so the places are enumerated: whatever
outlives a process (a rename, an append, a request to the tracking server) is done within `durable(NAME)`.
Nothing happens there unless $QLORA_FAILPOINTS names a folder. Then each passage is counted, over all
processes of this machine, in FOLDER/passed/NAME, FOLDER/places has a line for each place that a process came
to, and where FOLDER/kill reads `NAME before N` or `NAME after N`, the process that comes there for the Nth
time ends by SIGKILL, as a machine that is taken away ends it.

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
    _come_to(Path(folder), f"{name} before {count}")
    yield
    _come_to(Path(folder), f"{name} after {count}")


def passages(folder: Path) -> dict[str, int]:
    """Return how often each failpoint was passed, by name, as counted in a folder of $QLORA_FAILPOINTS."""
    return {path.name: path.stat().st_size for path in sorted((folder / "passed").glob("*"))}


def places(folder: Path) -> list[tuple[int, str]]:
    """Return (process id, place) in the order in which processes came there, as noted in such a folder.

    A place reads `NAME before N` or `NAME after N`.
    """
    lines = (folder / "places").read_text(encoding="utf-8").splitlines()
    return [(int(process), place) for process, _, place in (line.partition(" ") for line in lines)]


def _count(path: Path) -> int:
    """Count a passage; return its number, from 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # other processes count, too
        file.write(b".")
        file.flush()
        return os.fstat(file.fileno()).st_size


def _come_to(folder: Path, place: str) -> None:
    """Note a place, and end the process if a test asks for it there; the place is then done with."""
    with open(folder / "places", "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {place}\n")  # at once, so that lines of several processes stay whole
    order = folder / "kill"
    if order.exists() and order.read_text(encoding="utf-8") == place:
        order.rename(folder / "killed")
        os.kill(os.getpid(), signal.SIGKILL)
