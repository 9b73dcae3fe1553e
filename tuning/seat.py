"""Owns a trial's seat on a host: who holds it, its work, what it was asked to reach and what it answers."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora.training import DivergedError
from tuning.examples import PromptedExamples
from tuning.objective import METRIC, VALUE, Objective
from tuning.shared_work import TrialWork


@dataclass
class Seat:
    """An attached trial: who holds it, its work, and the step that it was asked to reach.

    examples: what it is trained and measured on.
    """

    holder: str
    work: TrialWork
    examples: PromptedExamples
    goal: int | None = None
    folder: str = ""
    reply: "Future[dict[str, Any]]" = field(default_factory=Future)

    @property
    def at_goal(self) -> bool:
        """Tell whether it has only to be evaluated."""
        return self.goal is not None and self.work.training.step >= self.goal

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

    def fail(self, error: Exception) -> None:
        """Answer whoever asked with an error; the seat waits for its next goal."""
        if self.goal is not None:
            self.goal = None
            self.reply.set_exception(error)

    def end_by_hand(self) -> None:
        """Answer whoever asked that the trial is to end; the seat waits to be left."""
        if self.goal is not None:
            self.goal = None
            self.reply.set_result({"by_hand": True})


def ended_by_hand() -> "Future[dict[str, Any]]":
    """Return what a trial that is to end is answered."""
    reply: Future[dict[str, Any]] = Future()
    reply.set_result({"by_hand": True})
    return reply


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
