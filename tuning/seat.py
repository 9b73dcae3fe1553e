"""Owns a trial's seat on a host: who holds it, its work, what it was asked to reach and what it answers."""

import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from qlora.checkpoint import CheckpointContent
from qlora.checkpoint_files import SINCE_REPORT
from qlora.training import DivergedError
from tuning.calls import settle
from tuning.checkpoints import STOPPED, Storage
from tuning.examples import PromptedExamples
from tuning.objective import METRIC, VALUE, Objective
from tuning.orders import SET_ASIDE
from tuning.shared_work import TrialWork

_BRINGERS, _WRITERS = 2, 4  # threads


@dataclass
class Seat:
    """An attached trial: who holds it, its work, and the step that it was asked to reach.

    examples: what it is trained and measured on. stops: the steps at which it is measured, ascending.
    ahead: the step up to which it trains before anybody asks, after a report. is_to_leave: whether it is to
    be set aside once it asks.
    """

    holder: str
    work: TrialWork
    examples: PromptedExamples
    stops: Sequence[int]
    goal: int | None = None
    ahead: int | None = None
    folder: str = ""
    is_to_leave: bool = False
    reply: "Future[dict[str, Any]]" = field(default_factory=Future)

    @property
    def at_goal(self) -> bool:
        """Tell whether it has only to be evaluated."""
        return self.goal is not None and self.work.training.step >= self.goal

    @property
    def is_between_reports(self) -> bool:
        """Tell whether it was asked to reach a step, and has trained since its last evaluation."""
        return self.goal is not None and bool(self.work.seen)

    @property
    def goes_ahead(self) -> bool:
        """Tell whether it has reported, and has steps to take that it is about to be asked for."""
        return self.ahead is not None and self.work.training.step < self.ahead

    @property
    def steps_to_go(self) -> int:
        """Return how many steps are left to what it was asked to reach."""
        return 0 if self.goal is None else max(0, self.goal - self.work.training.step)

    def diverged(self, perplexity: float) -> DivergedError:
        """Return the error of a public perplexity that is no number."""
        return DivergedError(
            f"diverged at step {self.work.training.step}: public perplexity {perplexity:g}; "
            "try a lower learning rate"
        )

    def ask(self, step: int, folder: str) -> "Future[dict[str, Any]]":
        """Have the trial train up to a step, be evaluated and write a checkpoint; returns the reply."""
        self.goal, self.ahead, self.folder, self.reply = step, None, folder, Future()
        return self.reply

    def fail(self, error: Exception) -> None:
        """Answer whoever asked with an error; the seat waits for its next goal."""
        self.ahead = None  # it fails again, when that is asked for
        if self.goal is not None:
            self.goal = None
            self.reply.set_exception(error)

    def answer(self, metrics: dict[str, Any]) -> None:
        """Answer whoever asked with something else than an evaluation; the seat waits to be left."""
        self.ahead = None
        if self.goal is not None:
            self.goal = None
            self.reply.set_result(metrics)

    def leave(self) -> "Future[dict[str, Any]]":
        """Ask no more of the trial; returns the reply that whoever asked waits for."""
        self.goal = None
        return self.reply

    def reported(self, *, goes_ahead: bool) -> None:
        """Begin a new stretch of steps: a report of the one before is on its way."""
        self.goal = None
        self.work.forget()
        if goes_ahead:
            self.ahead = next((step for step in self.stops if step > self.work.training.step), None)


@dataclass(frozen=True)
class Standing:
    """Holds where a trial stands between two reports: what a checkpoint has, and what was seen since one."""

    content: CheckpointContent
    since: str

    @classmethod
    def of(cls, work: TrialWork) -> Self:
        """Copy it from a trial's work."""
        since = {"seconds": work.seconds, "steps": [asdict(step) for step in work.seen]}
        return cls(CheckpointContent.of(work.training), json.dumps(since))

    def put(self, storage: Storage, trial_id: str) -> None:
        """Put it into the storage as TRIAL/checkpoint_stopped."""
        with tempfile.TemporaryDirectory() as folder:
            self.content.write(Path(folder), {SINCE_REPORT: self.since})
            storage.put(Path(folder), f"{storage.folder_of(trial_id)}/{STOPPED}")

    def set_aside(self, storage: Storage, trial_id: str) -> dict[str, Any]:
        """Put it there for a trial that leaves its seat; returns what the trial is answered."""
        self.put(storage, trial_id)
        return {SET_ASIDE: True}


def answered(metrics: dict[str, Any]) -> "Future[dict[str, Any]]":
    """Return the answer to a trial that is to do nothing more."""
    reply: Future[dict[str, Any]] = Future()
    reply.set_result(metrics)
    return reply


class Writers:
    """Threads that write checkpoints while their trials train on.

    Some bring what is held to the host's memory, so that it leaves a GPU soon; others write that, which takes
    longer, several at once: trials of one length report together.
    """

    def __init__(self) -> None:
        self._bringing, self._writing = ThreadPoolExecutor(_BRINGERS), ThreadPoolExecutor(_WRITERS)

    def submit(self, reply: "Future[dict[str, Any]]", write: Callable[[], dict[str, Any]]) -> None:
        """Answer with what writing returns or raises."""
        self._writing.submit(settle, reply, write)

    def submit_report(
        self,
        reply: "Future[dict[str, Any]]",
        collect: Callable[[], CheckpointContent],
        folder: Path,
        metrics: dict[str, Any],
    ) -> None:
        """Answer with a report's metrics once its checkpoint is written, or with what that failed with."""

        def bring() -> None:
            try:
                content = collect()
                self.submit(reply, lambda: _write_report(content, folder, metrics))
            except Exception as error:  # belongs to the caller; a traceback would keep what is held
                reply.set_exception(error.with_traceback(None))

        self._bringing.submit(bring)


def _write_report(content: CheckpointContent, folder: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Write a report's checkpoint; returns its metrics. Raises OSError."""
    content.write(folder)
    return metrics


def point_of(work: TrialWork, perplexity: float, objective: Objective, value: float) -> dict[str, Any]:
    """Return a point of a trial's curve: what it measured, and of its steps since the point before.

    `value`: the objective's.
    """
    training, seen = work.training, work.seen
    on_gpu = training.bank.device.type == "cuda"
    return {
        "public_perplexity": perplexity,
        METRIC: objective.score(value),
        **({} if objective.is_perplexity else {VALUE: value}),
        "training_loss": sum(result.loss for result in seen) / max(len(seen), 1),
        "learning_rate": seen[-1].learning_rate if seen else 0.0,
        "step": training.step,
        "epoch": training.timetable.epochs_at(training.step),
        "schedule_percent": training.timetable.percent_at(training.step),
        "tokens_per_second": sum(result.num_tokens for result in seen) / max(work.seconds, 1e-9),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
    }
