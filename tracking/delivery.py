"""Owns a thread that brings news to the tracking server, so that whoever has news never waits for it.

News come as actions under keys. Of one key only the newest counts, so an action says all that its key has to
say, and doing it twice changes nothing. While the server is away the thread tries again after a pause that
grows; whatever came in meanwhile is caught up with.

Refuses to know what the news are.
"""

import threading
from collections.abc import Callable
from functools import partial

from tracking.errors import TrackingAwayError
from tracking.store import away

_GATHER_SECONDS = 1.0  # a trial's last point and its end come together, and go together
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 2.0, 30.0


class Delivery:
    """A thread of its own with actions to carry out."""

    def __init__(self) -> None:
        """Begin with nothing to do; the thread starts with the first action."""
        self._changed = threading.Condition()
        self._waiting: dict[str, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None
        self._is_busy = self._is_hurried = self._is_kicked = self._is_stopped = False
        self._away: TrackingAwayError | None = None
        self._failure: Exception | None = None
        self._num_answers = 0

    def put(self, key: str, action: Callable[[], None]) -> None:
        """Have an action carried out, in place of one of the same key that still waits. Returns at once."""
        with self._changed:
            self._waiting[key] = action
            if self._thread is None and not self._is_stopped:
                self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def catch_up(self, timeout_seconds: float) -> None:
        """Wait until all is carried out.

        Raises TrackingAwayError if the server answers nothing for that long, and what an action raised for
        other reasons.
        """
        self.drain(timeout_seconds)
        if self._failure is not None:
            raise self._failure

    def drain(self, timeout_seconds: float) -> None:
        """Wait until nothing waits, cutting a pause short.

        Raises TrackingAwayError if the server answers nothing for that long: one that is slow gets on.
        """
        with self._changed:
            self._is_hurried = self._is_kicked = True
            self._changed.notify_all()
            while self._waiting or self._is_busy:
                if not self._changed.wait_for(partial(self._has_moved, self._num_answers), timeout_seconds):
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

    def _has_moved(self, num_answers: int) -> bool:
        """Tell whether there are more answers than so many, or all is carried out."""
        return self._num_answers > num_answers or not (self._waiting or self._is_busy)

    def _work(self) -> None:
        pause_seconds = _FIRST_PAUSE_SECONDS
        while (batch := self._next_batch()) is not None:
            is_there = self._carry_out(batch)
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
                if is_there:
                    pause_seconds = _FIRST_PAUSE_SECONDS
                    continue
                pause = _FIRST_PAUSE_SECONDS if self._is_hurried else pause_seconds
                self._changed.wait_for(lambda: self._is_stopped or self._is_kicked, pause)
                pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)

    def _next_batch(self) -> dict[str, Callable[[], None]] | None:
        """Wait for actions and take them all; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_stopped)
            self._changed.wait_for(lambda: self._is_hurried or self._is_stopped, _GATHER_SECONDS)
            if self._is_stopped:
                return None
            batch, self._waiting = self._waiting, {}
            self._is_busy, self._is_kicked = True, False
            return batch

    def _carry_out(self, batch: dict[str, Callable[[], None]]) -> bool:
        """Carry out actions; returns whether the server was there. What is left waits again."""
        while batch and not self._is_stopped:
            key = next(iter(batch))
            try:
                batch[key]()
            except TrackingAwayError as error:
                with self._changed:
                    self._away = error
                    self._waiting = {**batch, **self._waiting}  # newer ones count
                return False
            except Exception as error:  # no reason to leave out the others; `catch_up` raises it
                self._failure = self._failure or error
            del batch[key]
            self.moved()
        self._away = None
        return True
