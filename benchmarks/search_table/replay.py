"""Owns a sweep that is played against the search table: who trains when, what it costs, what is best so far.

Searchers and schedulers are asked through Ray Tune's own interfaces. A proposal is answered by the nearest
configuration that is not used yet, whose curve then is the trial's. Trials on one GPU take their steps
together: a step of n costs what the table's own steps of n trials took. Refuses to know who searches.
"""

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray.tune.experiment import Trial as RaysTrial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from benchmarks.search_table.table import Row, Table
from qlora.config import parse_stages
from qlora.training import Timetable
from tuning.evaluation_steps import evaluation_steps
from tuning.objective import METRIC
from tuning.strategy import Asha, Rounds

_WORST = 1e4  # perplexity that is told apart
_PATIENCE = 200  # proposals of nothing, from a searcher that waits for results


@dataclass(frozen=True)
class Costs:
    """The seconds of a GPU: of a step, besides those of each trial in it, and of an evaluation."""

    step: float
    step_of_trial: float
    evaluation: float

    @classmethod
    def of(cls, table: Table) -> "Costs":
        """Fit the cost of steps to the table's: a tenth of them took less, undisturbed by other processes."""
        took: dict[int, list[float]] = {}
        for facts in table.facts:
            for count, _, _, seconds in facts["costs"]:
                took.setdefault(int(count), []).append(seconds)
        counts = [count for count, seconds in took.items() if len(seconds) > 100]
        quick = [float(np.quantile(took[count], 0.1)) for count in counts]
        slope, fixed = np.polyfit(counts, quick, 1, w=1 / np.array(quick))
        evaluation = statistics.median(point.evaluation_seconds for row in table.rows for point in row.points)
        return cls(max(0.0, float(fixed)), float(slope), evaluation)


@dataclass
class Trial:
    """A trial in play, which schedulers see as one of Ray's.

    step: optimizer steps that it has done. stops: steps at which it is yet evaluated.
    """

    trial_id: str
    row: Row
    timetable: Timetable
    stops: list[int]
    step: int = 0
    evaluations: int = 0
    status: str = RaysTrial.PENDING

    def is_finished(self) -> bool:
        """Tell whether it has ended."""
        return self.status == RaysTrial.TERMINATED

    def perplexity(self) -> float:
        """Return the public perplexity at its step, in between two of its points by logarithms."""
        points = self.row.points
        place = bisect_left(points, self.step, key=lambda point: point.step)
        after = points[min(place, len(points) - 1)]
        before = points[max(place - 1, 0)]
        share = (self.step - before.step) / max(1, after.step - before.step)
        low, high = (math.log(min(one.public_perplexity, _WORST)) for one in (before, after))
        return math.exp(low + (high - low) * min(1.0, share))

    def result(self) -> dict[str, Any]:
        """Return what it reports."""
        self.evaluations += 1
        return {
            "trial_id": self.trial_id,
            "step": self.step,
            "training_iteration": self.evaluations,
            "epoch": self.timetable.epochs_at(self.step),
            "schedule_percent": self.timetable.percent_at(self.step),
            METRIC: self.perplexity(),
        }


@dataclass(frozen=True)
class Played:
    """A sweep that was played: when the best public perplexity so far got better (seconds), and to what.

    ended: seconds at its end.
    """

    seconds: tuple[float, ...]
    best: tuple[float, ...]
    ended: float

    def best_at(self, seconds: float) -> float:
        """Return the best perplexity that was known after so many seconds; infinity before there is one."""
        known = [best for when, best in zip(self.seconds, self.best, strict=True) if when <= seconds]
        return known[-1] if known else math.inf

    def seconds_to(self, perplexity: float) -> float:
        """Return after how many seconds a perplexity was reached; infinity if it never was."""
        reached = [when for when, best in zip(self.seconds, self.best, strict=True) if best <= perplexity]
        return reached[0] if reached else math.inf


@dataclass
class _Play:
    rows: Sequence[Row]
    costs: Costs
    searcher: Searcher
    scheduler: TrialScheduler
    rungs: Asha | Rounds
    together: int
    most_seconds: float
    enough: float
    may_begin: Callable[[int], bool]
    now: float = 0.0
    trials: list[Trial] = field(default_factory=list)
    running: list[Trial] = field(default_factory=list)
    history: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._places = np.array([coordinates(row.config) for row in self.rows])
        self._unused = np.ones(len(self.rows), dtype=bool)

    def get_trials(self) -> list[Trial]:
        """Return all trials, as Ray's controller does for a scheduler."""
        return self.trials

    def stop_trial(self, trial: Trial) -> None:
        """Stop a trial that is paused, as Ray's controller does for a scheduler."""
        trial.status = RaysTrial.TERMINATED
        self._asked(self.scheduler.on_trial_remove, trial)
        self.searcher.on_trial_complete(trial.trial_id)

    def run(self) -> Played:
        idle = 0
        while self.now < self.most_seconds and idle < _PATIENCE:
            self._fill()
            if self.running:
                idle = 0
                self._advance()
            elif self._unused.any():
                idle += 1
            else:
                break
            if self.history and self.history[-1][1] <= self.enough:
                break
        seconds, best = zip(*self.history, strict=True) if self.history else ((), ())
        return Played(tuple(seconds), tuple(best), self.now)

    def _asked(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """Ask the scheduler as Ray's controller does."""
        controller: Any = self
        return question(controller, *arguments)

    def _fill(self) -> None:
        """Let paused trials that their scheduler chooses go on, and new ones begin, while there is room."""
        while len(self.running) < self.together:
            chosen = self._asked(self.scheduler.choose_trial_to_run)
            if chosen is None and self._unused.any() and self.may_begin(len(self.trials)):
                chosen = self._begun()
            if chosen is None:
                return
            chosen.status = RaysTrial.RUNNING
            self.running.append(chosen)

    def _begun(self) -> Trial | None:
        trial_id = f"0_{len(self.trials):05d}"
        proposal = self.searcher.suggest(trial_id)
        if not isinstance(proposal, dict):
            return None
        row = self._nearest(proposal)
        stages = parse_stages(row.config["epochs"])
        timetable = Timetable(row.points[-1].step // sum(stages), stages)
        trial = Trial(trial_id, row, timetable, sorted(evaluation_steps(timetable, self.rungs, 1)))
        self.trials.append(trial)
        self._asked(self.scheduler.on_trial_add, trial)
        return trial

    def _nearest(self, proposal: Mapping[str, Any]) -> Row:
        """Return the unused row whose configuration is the nearest to a proposal; from now on it is used."""
        distances = ((self._places - coordinates(proposal)) ** 2).sum(axis=1)
        number = int(np.where(self._unused, distances, np.inf).argmin())
        self._unused[number] = False
        return self.rows[number]

    def _advance(self) -> None:
        """Let all take their steps up to the next evaluation of any."""
        steps = min(trial.stops[0] - trial.step for trial in self.running)
        self.now += steps * (self.costs.step + self.costs.step_of_trial * len(self.running))
        for trial in self.running:
            trial.step += steps
        for trial in [trial for trial in self.running if trial.step == trial.stops[0]]:
            trial.stops.pop(0)
            self.now += self.costs.evaluation
            self._report(trial)

    def _report(self, trial: Trial) -> None:
        result = trial.result()
        if not self.history or result[METRIC] < self.history[-1][1]:
            self.history.append((self.now, result[METRIC]))
        decision = self._asked(self.scheduler.on_trial_result, trial, result)
        if decision != TrialScheduler.STOP:
            self.searcher.on_trial_result(trial.trial_id, result)
        if decision == TrialScheduler.CONTINUE and trial.stops:
            return
        self.running.remove(trial)
        if decision == TrialScheduler.PAUSE:
            trial.status = RaysTrial.PAUSED
            return
        trial.status = RaysTrial.TERMINATED
        self._asked(self.scheduler.on_trial_complete, trial, result)
        self.searcher.on_trial_complete(trial.trial_id, result)


def play(
    rows: Sequence[Row],
    costs: Costs,
    searcher: Searcher,
    scheduler: TrialScheduler,
    rungs: Asha | Rounds,
    together: int,
    most_seconds: float = math.inf,
    enough: float = 0.0,
    may_begin: Callable[[int], bool] = lambda number: True,
) -> Played:
    """Play a sweep against rows, each used once at most, until all are, or a time or perplexity is reached.

    rungs: what says, with each epoch's end, when trials are evaluated. together: trials on the GPU at once.
    may_begin: whether a new trial may, by its number.
    """
    searcher.set_search_properties(METRIC, "min", {})
    scheduler.set_search_properties(METRIC, "min")
    return _Play(rows, costs, searcher, scheduler, rungs, together, most_seconds, enough, may_begin).run()


def coordinates(config: Mapping[str, Any]) -> "np.ndarray[Any, Any]":
    """Return where a configuration lies, such that a distance says how far it moves a perplexity.

    A factor of two in the rate counts as much as one in the epochs.
    """
    stages = parse_stages(config["epochs"])
    return np.array(
        [
            math.log2(config["learning_rate"]),
            0.5 * math.log2(config["lora_alpha"]),
            0.25 * math.log2(config["lora_r"]),
            math.log2(sum(stages)),
            0.25 * len(stages),
            0.5 * config["lora_dropout"],
            0.25 * (config["schedule"] == "linear"),
        ]
    )
