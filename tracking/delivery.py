"""Owns a thread that brings news to the tracking server, so that whoever has news never waits for it.

News come as actions under keys. Of one key only the newest counts, so an action says all that its key has to
say, and doing it twice changes nothing. While the server is away the thread tries again after a pause that
grows; whatever came in meanwhile is caught up with.

Refuses to know what the news are.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tracking.address import away
from tracking.errors import TrackingAwayError

_GATHER_SECONDS = 1.0  # a trial's last point and its end come together, and go together
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 2.0, 30.0


@dataclass(frozen=True)
class _News:
    """An action, and the how manieth it was of all that were put."""

    number: int
    action: Callable[[], None]


class Delivery:
    """A thread of its own with actions to carry out."""

    def __init__(self) -> None:
        """Begin with nothing to do; the thread starts with the first action."""
        self._changed = threading.Condition()
        self._waiting: dict[str, _News] = {}
        self._going: dict[str, _News] = {}  # what the thread has taken and not carried out yet
        self._thread: threading.Thread | None = None
        self._is_hurried = self._is_kicked = self._is_stopped = False
        self._away: TrackingAwayError | None = None
        self._failure: Exception | None = None
        self._num_put = self._num_answers = 0

    def put(self, key: str, action: Callable[[], None]) -> None:
        """Have an action carried out, in place of one of the same key that still waits. Returns at once."""
        with self._changed:
            self._num_put += 1
            self._waiting[key] = _News(self._num_put, action)
            if self._thread is None and not self._is_stopped:
                self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def catch_up(self, timeout_seconds: float) -> None:
        """Wait until all that was put so far is carried out.

        Raises TrackingAwayError if the server answers nothing for that long, and what an action raised for
        other reasons.
        """
        self.drain(timeout_seconds)
        if self._failure is not None:
            raise self._failure

    def drain(self, timeout_seconds: float) -> None:
        """Wait until all that was put so far is carried out or replaced, cutting a pause short.

        Raises TrackingAwayError if the server answers nothing for that long: one that is slow gets on.
        """
        with self._changed:
            self._is_hurried = self._is_kicked = True
            self._changed.notify_all()
            last = self._num_put
            while self._is_open(last):
                has_moved = partial(self._has_moved, self._num_answers, last)
                if not self._changed.wait_for(has_moved, timeout_seconds):
                    self._is_hurried = False
                    raise self._away or away(f"it answered nothing for {timeout_seconds:.3g} s")
            self._is_hurried = False

    def moved(self) -> None:
        """Tell that the server has answered, within an action of several requests."""
        with self._changed:
            self._num_answers += 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Begin no further action; one that is going on ends by itself."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _is_open(self, last: int) -> bool:
        """Tell whether any of the first so many actions is still to be carried out."""
        return any(news.number <= last for news in (*self._going.values(), *self._waiting.values()))

    def _has_moved(self, num_answers: int, last: int) -> bool:
        """Tell whether there are more answers than so many, or none of the first actions is open."""
        return self._num_answers > num_answers or not self._is_open(last)

    def _work(self) -> None:
        pause_seconds = _FIRST_PAUSE_SECONDS
        while self._take_all():
            is_there = self._carry_out()
            with self._changed:
                self._changed.notify_all()
                if is_there:
                    pause_seconds = _FIRST_PAUSE_SECONDS
                    continue
                pause = _FIRST_PAUSE_SECONDS if self._is_hurried else pause_seconds
                self._changed.wait_for(lambda: self._is_stopped or self._is_kicked, pause)
                pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)

    def _take_all(self) -> bool:
        """Wait for actions and take them all; returns whether there are any, which is so until the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_stopped)
            self._changed.wait_for(lambda: self._is_hurried or self._is_stopped, _GATHER_SECONDS)
            if self._is_stopped:
                return False
            self._going, self._waiting = self._waiting, {}
            self._is_kicked = False
            return True

    def _carry_out(self) -> bool:
        """Carry out what was taken; returns whether the server was there. What is left waits again."""
        while self._going and not self._is_stopped:
            key = next(iter(self._going))
            try:
                self._going[key].action()
            except TrackingAwayError as error:
                with self._changed:
                    self._away = error
                    self._waiting = {**self._going, **self._waiting}  # newer ones count
                    self._going = {}
                return False
            except Exception as error:  # no reason to leave out the others; `catch_up` raises it
                self._failure = self._failure or error
            with self._changed:
                del self._going[key]
            self.moved()
        self._going = {}
        self._away = None
        return True
