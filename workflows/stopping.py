"""Owns how a command is stopped: signals end it in order, and only once.

SIGINT (Ctrl-C), SIGTERM (a spot notice, systemd, `ray job stop`) and SIGHUP (a closed terminal) all raise
KeyboardInterrupt in the main thread. Signals that follow are ignored, so that none disturbs the ending. A
signal that was ignored when the command started, as under nohup, stays ignored.

Imports nothing heavy. Refuses to know what the ending consists of.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_received: list[int] = []
_held_back: list[bool] = []
_ending = threading.Event()
_ENDED = 3  # the exit code of what was stopped, which session's contract names


def leave_at_signals() -> None:
    """Have signals end the process in one line until `catch_signals`: nothing was begun yet."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def end() -> None:
    """Ignore signals from here on: the command is ending."""
    _ending.set()


def catch_signals() -> None:
    """Take the signals over; again, from whoever took them meanwhile, as `ray.init` does."""
    _ending.clear()
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


@contextmanager
def children_outlive_the_terminal() -> Iterator[None]:
    """Let processes that are started within ignore SIGHUP, which a terminal that is closed sends to all.

    They are needed for the ending.
    """
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def held_back() -> Iterator[None]:
    """Let nothing be broken off within: a signal that comes there raises KeyboardInterrupt at the end."""
    before = bool(_received)
    _held_back.append(True)
    try:
        yield
    finally:
        _held_back.pop()
    if _received and not before:
        raise KeyboardInterrupt


def go_on() -> None:
    """Raise KeyboardInterrupt if a signal has come.

    For loops of libraries: what a handler raises may be lost there.
    """
    if _received:
        raise KeyboardInterrupt


def was_stopped() -> bool:
    """Tell whether a signal has come."""
    return bool(_received)


def signal_name() -> str:
    """Name the signal that has come."""
    return signal.Signals(_received[0]).name if _received else "SIGINT"


def _leave(number: int, frame: FrameType | None) -> None:
    words = f"stopped: by {signal.Signals(number).name}; run the same command again\n"
    os.write(2, words.encode())
    os._exit(_ENDED)


def _stop(number: int, frame: FrameType | None) -> None:
    if not _received and not _ending.is_set():
        _received.append(number)
        if not _held_back:
            raise KeyboardInterrupt
