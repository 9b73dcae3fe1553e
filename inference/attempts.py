"""Owns what is known of work whose process died: which rows to try apart or give up, when to stop.

A process that is killed (a fault of its own, no memory left, a node that is gone) can't say what it was at.
So a worker says which rows it begins with, before it does, and that they ended, after. `Attempts` learns of a
death when a worker starts again that had not ended its rows. Those rows are then tried in pieces of an
eighth, down to rows alone. A row that is alone then when its process dies, twice, is given up. Rows that
ended once are like any others again. So a lost node costs a row nothing: it is tried again. Two cost one only
if both are lost just while it is alone, after a death that another row brought.

A worker that dies again and again while no worker ends any row has no rows to blame: work is to stop then.

Refuses to know what is done with rows.
"""

import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from qlora.config import InputError, first_line

_PARTS = 8  # of a piece whose process died
_MOST_DEATHS_ALONE = 2  # of a row
_MOST_DEATHS_IDLE = 3  # of a worker in turn, while it has no rows: it can't be loaded
_MOST_DEATHS = 20  # of a worker in turn, at whatever rows


class EnginesDiedError(RuntimeError):
    """Processes of a job died again and again, without a finished row; the text says what can be done."""


@dataclass
class _Suspect:
    """A row whose process died: rows it may be together with, and further deaths while it was alone."""

    most_rows: int
    deaths_alone: int = 0


@dataclass
class _Worker:
    """A worker of a pool: the rows it has begun and not ended, and its deaths since any worker ended rows.

    why: what it said before it died, if it could.
    """

    begun: tuple[int, ...] = ()
    deaths: int = 0
    deaths_idle: int = 0
    why: str = ""


@dataclass
class Attempts:
    """The attempts of a pool's workers at rows. `what` names a worker in error lines."""

    what: str
    _workers: dict[str, _Worker] = field(default_factory=dict)
    _suspects: dict[int, _Suspect] = field(default_factory=dict)

    def start(self, name: str) -> str:
        """Note that a process of this worker starts; return why it should not load anything, or ''."""
        worker = self._workers.get(name)
        if worker is None:
            self._workers[name] = _Worker()
            return ""
        worker.deaths += 1
        why, worker.why = worker.why, ""
        worker.deaths_idle = 0 if worker.begun else worker.deaths_idle + 1
        self._bury(worker)
        if worker.deaths_idle >= _MOST_DEATHS_IDLE:
            if why:
                return (
                    f"the {self.what} can't be loaded ({why}); what is done is kept: "
                    "mend that, then run the same command with --resume"
                )
            times = f"{worker.deaths_idle} times before it began to work"
        elif worker.deaths >= _MOST_DEATHS:
            times = f"{worker.deaths} times without a finished row"
        else:
            return ""
        return (
            f"the {self.what}'s process died {times}; look for a lack of memory or a fault of the device, "
            "then run the same command with --resume, which keeps what is done"
        )

    def lament(self, name: str, why: str) -> None:
        """Note why the process of this worker is about to die."""
        self._workers.setdefault(name, _Worker()).why = why

    def plan(self, name: str, rows: Sequence[int]) -> tuple[list[list[int]], dict[int, str]]:
        """Divide rows into pieces to do in turn, the first of which counts as begun, and errors of others.

        What is most likely to kill a process comes first, so that little is done in vain.
        """
        for worker in self._workers.values():  # rows of a worker that is gone for good come to another one
            if not set(rows).isdisjoint(worker.begun):
                self._bury(worker)
        errors = {row: self._error() for row in rows if self._deaths_alone(row) >= _MOST_DEATHS_ALONE}
        left = [row for row in rows if row not in errors]
        left.sort(key=lambda row: (self._most_rows(row), self._deaths_alone(row)))  # stable: as they came
        pieces: list[list[int]] = []
        for row in left:
            if pieces and len(pieces[-1]) < self._most_rows(pieces[-1][0]):
                pieces[-1].append(row)
            else:
                pieces.append([row])
        if pieces:
            self.begin(name, pieces[0])
        return pieces, errors

    def begin(self, name: str, rows: Sequence[int]) -> None:
        """Note that a worker begins with rows."""
        self._workers.setdefault(name, _Worker()).begun = tuple(rows)

    def end(self, name: str, rows: Sequence[int]) -> None:
        """Note that rows came to an end, whatever that was, with the worker alive."""
        for row in rows:
            self._suspects.pop(row, None)
        for worker in self._workers.values():
            worker.deaths = worker.deaths_idle = 0
            if worker.begun == tuple(rows):
                worker.begun = ()

    def _bury(self, worker: _Worker) -> None:
        """Suspect the rows that a dead process had begun."""
        rows, worker.begun = worker.begun, ()
        for row in rows:
            if row not in self._suspects:  # a first death says nothing: two lost nodes cost no row
                self._suspects[row] = _Suspect(max(1, len(rows) // _PARTS))
            else:
                self._suspects[row].most_rows = max(1, len(rows) // _PARTS)
                self._suspects[row].deaths_alone += len(rows) == 1

    def _most_rows(self, row: int) -> float:
        return self._suspects[row].most_rows if row in self._suspects else math.inf

    def _deaths_alone(self, row: int) -> int:
        return self._suspects[row].deaths_alone if row in self._suspects else 0

    def _error(self) -> str:
        return f"its {self.what}'s process died {_MOST_DEATHS_ALONE} times"


class Witness:
    """A server of the attempts of a job's pools, in a process that outlives theirs."""

    def __init__(self, *pools: str):
        self.attempts = {what: Attempts(what) for what in pools}

    def call(self, what: str, method: str, *arguments: Any) -> Any:
        """Call a method of the attempts of a pool."""
        return getattr(self.attempts[what], method)(*arguments)


class Witnessed:
    """A worker's own end of its pool's attempts, made where the worker's process starts.

    stop: why the worker should load nothing and do nothing, or ''.
    """

    def __init__(self, witness: Any, what: str):
        self._witness = witness
        self._what = what
        self._name = ray.get_runtime_context().get_actor_id()  # the same after a restart
        self.stop: str = ray.get(self._call("start"))

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Tell of an error that is raised within, other than an InputError, and end the worker's process.

        Ray starts it again, with its memory freed. An error that is raised there would end the whole job.
        """
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            traceback.print_exc()
            ray.get(self._call("lament", f"{type(error).__name__}: {first_line(error)}"))
            sys.stderr.flush()
            os._exit(1)

    def pieces(self, rows: Sequence[int], errors: dict[int, str]) -> Iterator[list[int]]:
        """Yield rows in pieces, each to be done before the next is asked for; add errors of rows given up."""
        pieces, given_up = ray.get(self._call("plan", list(rows)))
        errors.update(given_up)
        for number, piece in enumerate(pieces):
            if number:
                ray.get(self._call("begin", piece))
            yield piece
            self._call("end", piece)  # whatever this process tells next comes after it

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._witness.call.remote(self._what, method, self._name, *arguments)
