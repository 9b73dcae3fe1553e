"""Owns that no run stays RUNNING when the command that made it is told to end.

Refuses to know what runs are of.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from qlora.failpoints import durable
from tracking.errors import TrackingAwayError
from tracking.store import children, connect, find_run

_SECONDS_TO_TELL, _SECONDS_TO_LOOK, _SECONDS_BETWEEN_LOOKS = 2.0, 1.0, 0.2


@contextmanager
def killed_if_left(experiment_id: str, tags: Mapping[str, str]) -> Iterator[None]:
    """End with KILLED, if what goes on within is broken off, the run with these tags and its children.

    Also a run that the server was just making. A server that is away, or slow, is not waited for.
    """
    try:
        yield
    except TrackingAwayError:
        raise
    except BaseException:
        within(_SECONDS_TO_TELL, lambda: _kill(experiment_id, tags))
        raise


def within(seconds: float, work: Callable[[], None]) -> bool:
    """Do work in a thread that nobody waits for any longer than this; returns whether it was done.

    What it raises is dropped: the ending that is going on has its own reason to tell.
    """
    is_done = threading.Event()

    def do() -> None:
        with suppress(Exception):
            work()
            is_done.set()

    thread = threading.Thread(target=do, name="tracking-end", daemon=True)
    thread.start()
    thread.join(seconds)
    return is_done.is_set()


def _kill(experiment_id: str, tags: Mapping[str, str]) -> None:
    """End the runs, and look for a while: the server may just be making one."""
    client, began = connect(), time.monotonic()
    while time.monotonic() - began < _SECONDS_TO_LOOK:
        parent = find_run(client, experiment_id, tags)
        runs = [] if parent is None else [*children(client, experiment_id, parent.info.run_id), parent]
        for run in runs:
            if run.info.status == "RUNNING":
                with durable("run ended"):
                    client.set_terminated(run.info.run_id, "KILLED")
        time.sleep(_SECONDS_BETWEEN_LOOKS)
