"""Owns what a command writes to: a screen, a pipe or a file, any of which may be closed or go away.

Refuses to know what is written.
"""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_NO_READER = (errno.EPIPE, errno.EIO)  # of a pipe; of a terminal
_GONE = "note: nobody reads what this command prints any more; its work goes on"


class _Screen:
    """A text stream that drops what nobody reads: work that prints is not to end for want of a reader."""

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name = stream, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (sys, self._name)  # another process has one of its own

    def write(self, text: str) -> int:
        """Write a text; return how many characters it has."""
        with self._while_read():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Have what is written read."""
        with self._while_read():
            self._stream.flush()

    @contextmanager
    def _while_read(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_READER:
                raise
            self._leave()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _leave(self) -> None:
        """Let the stream lead nowhere, and say so where somebody may read it."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self._stream.fileno() != 2:
            with suppress(OSError, ValueError, AttributeError):
                print(_GONE, file=sys.stderr, flush=True)


@contextmanager
def open_screens() -> Iterator[None]:
    """Have something to print to within, whatever the command was started with.

    What a stream's encoding lacks is written as escapes.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # in place of one that was closed: else the next file that is opened would be taken for it
    os.close(number)
    for number in range(3):
        os.set_inheritable(number, True)  # else a child would have none, and take its first file for one
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_screen(stream, number) for number, stream in enumerate(before, 1))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _screen(stream: TextIO | None, number: int) -> Any:
    opened = os.fdopen(number, "w", closefd=False) if stream is None else stream
    if getattr(opened, "errors", None) == "strict" and hasattr(opened, "reconfigure"):
        opened.reconfigure(errors="backslashreplace")
    return _Screen(opened, ("stdout", "stderr")[number - 1])
