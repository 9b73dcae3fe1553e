"""Owns how many threads have one thread do things for them: they leave a call, and wait for its answer."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

_Answer = TypeVar("_Answer")


class Calls:
    """Calls that are yet to be carried out, in the order in which they came."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()

    def ask(self, call: Callable[[], _Answer]) -> _Answer:
        """Have the other thread carry out a call; returns or raises what it does."""
        reply: Future[_Answer] = Future()
        with self._changed:
            self._waiting.append((call, reply))
            self._changed.notify()
        return reply.result()

    def leave(self, call: Callable[[], Any]) -> None:
        """Have the other thread carry out a call when it comes to it; nobody waits for that."""
        with self._changed:
            self._waiting.append((call, Future()))
            self._changed.notify()

    def take(self, has_work: Callable[[], Any]) -> "deque[tuple[Callable[[], Any], Future[Any]]]":
        """Wait for calls, or for work of the other thread's own; returns the calls, to be settled."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or has_work())
            taken, self._waiting = self._waiting, deque()
        return taken


def settle(reply: "Future[Any]", call: Callable[[], Any]) -> None:
    """Answer with what a call returns or raises."""
    try:
        reply.set_result(call())
    except Exception as error:  # belongs to the caller
        reply.set_exception(error)
