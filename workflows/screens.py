"""Owns what a command writes to: a screen, a pipe or a file, any of which may be closed or go away.

Refuses to know what is written.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_GONE = "note: nobody reads what this command prints any more; its work goes on"


class _Screen:
    """A text stream that drops what nobody reads: work that prints is not to end for want of a reader."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; return how many characters it has."""
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._leave()
        return len(text)

    def flush(self) -> None:
        """Have what is written read."""
        try:
            self._stream.flush()
        except BrokenPipeError:
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
    return _Screen(opened)
