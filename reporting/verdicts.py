"""Owns what is said of a sweep's result in words: what is best, how sure that is, what to expect of it.

Refuses to know Ray, the tracking server and pages.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reporting.intervals import Interval, bootstrap_interval, compare, expect_unseen

_FEWEST_EXAMPLES = 8  # to say what to expect of others


@dataclass(frozen=True)
class Measure:
    """The figure that trials are ranked by. words, label: in sentences and in columns."""

    words: str = "public perplexity"
    label: str = "perplexity"
    more_is_better: bool = False

    @property
    def is_perplexity(self) -> bool:
        """Tell whether it is public perplexity, of which each example has its own."""
        return self == Measure()


PERPLEXITY = Measure()


@dataclass(frozen=True)
class TrialReport:
    """One trial of the page.

    settings: those that were searched. curve: (percent of its schedule, what trials are ranked by).
    perplexities: of each public example at its best point. is_cut: whether a budget or people stopped it.
    more_is_better: of the curve. base: its value for the base alone under the trial's prompt, if that is
    another than others'. The rest is what it cost.
    """

    name: str
    settings: Mapping[str, Any]
    status: str
    reason: str
    curve: Sequence[tuple[float, float]]
    perplexities: Sequence[float]
    training_loss: float | None
    tokens_per_second: float | None
    peak_memory_gib: float
    seconds: float | None
    is_cut: bool = False
    more_is_better: bool = False
    base: float | None = None

    @property
    def best(self) -> float:
        """Return the curve's best value; infinitely bad before the first evaluation."""
        values = [value for _, value in self.curve]
        return max(values, default=-math.inf) if self.more_is_better else min(values, default=math.inf)


@dataclass(frozen=True)
class AverageReport:
    """An average of trials' adapters that is better than each of them.

    members: names of trials. perplexities: of each public example.
    """

    members: Sequence[str]
    perplexities: Sequence[float]

    @property
    def name(self) -> str:
        """Return what people call it."""
        if len(self.members) == 1:
            return f"the average of two checkpoints of trial {self.members[0]}"
        return f"the average of trials {' and '.join([', '.join(self.members[:-1]), self.members[-1]])}"


@dataclass(frozen=True)
class HoldoutReport:
    """The perplexities of examples that nothing was chosen on, under the best adapter and its runner-up.

    words: what the examples hold. runner_up: a trial's name; empty if there is no other, and then there are
    no perplexities of it.
    """

    words: str
    best: Sequence[float]
    runner_up: str
    perplexities: Sequence[float]


def verdict(
    trials: Sequence[TrialReport],
    zero_shot: float,
    average: AverageReport | None = None,
    measure: Measure = PERPLEXITY,
) -> str:
    """Say which adapter is best, a trial's or an average's, and whether it can be told from the runner-up.

    Of a measure of texts there is one figure for all examples, so that nothing is said of how sure it is.
    """
    order = ranked(trials)
    if not measure.is_perplexity:
        return _of_texts(order[0], order[1:], zero_shot, measure)
    if average is not None:
        name, values, rivals, rival_is = average.name, average.perplexities, order, "the best trial"
    else:
        name, values = f"trial {order[0].name}", order[0].perplexities
        rivals, rival_is = order[1:], "its runner-up"
    low, high = bootstrap_interval(values)
    best = float(np.mean(values)) if average is not None else order[0].best
    words = (
        f"{name[0].upper()}{name[1:]} is best: public perplexity {best:.4g} "
        f"(95 % interval over examples {low:.4g} to {high:.4g}), zero-shot {zero_shot:.4g}."
    )
    if not rivals or not rivals[0].curve:
        return words
    second = rivals[0]
    difference, low, high = compare(values, second.perplexities)
    found = (
        f"{rival_is} {second.name} ({second.best:.4g}): the difference is {difference:.3g}, "
        f"95 % interval {low:.3g} to {high:.3g} on {len(values)} examples."
    )
    if low <= 0 <= high:
        return f"{words} It can't be told from {found}"
    return f"{words} It is better than {found}"


def _of_texts(first: TrialReport, others: Sequence[TrialReport], zero_shot: float, measure: Measure) -> str:
    words = f"Trial {first.name} is best: {measure.words} {first.best:.4g}, zero-shot {zero_shot:.4g}"
    second = next((f"; its runner-up {one.name} has {one.best:.4g}" for one in others if one.curve), "")
    return f"{words}{second}. Its public perplexity is {float(np.mean(first.perplexities)):.4g}."


def outlook(
    trials: Sequence[TrialReport],
    average: AverageReport | None = None,
    holdout: HoldoutReport | None = None,
    measure: Measure = PERPLEXITY,
) -> str:
    """Say what to expect on unseen examples: what the holdout has, else what chosen examples let expect.

    That is of perplexities alone.
    """
    if holdout is not None:
        return _on_holdout(holdout)
    if not measure.is_perplexity:
        return ""
    expected = expected_unseen(trials, average)
    if expected is None:
        return ""
    values = average.perplexities if average is not None else ranked(trials)[0].perplexities
    words, better = f"On unseen examples of the same kind expect {expected.words()}", ""
    if (flattery := 1 - float(np.mean(values)) / expected.mean) >= 0.0005:
        better = f": on the examples that it was chosen on the best looks {flattery:.1%} better than it is"
    return f"{words}{better}."


def expected_unseen(trials: Sequence[TrialReport], average: AverageReport | None = None) -> Interval | None:
    """Return what the best adapter's mean perplexity is on unseen examples; None for too few examples."""
    chosen_from = [trial.perplexities for trial in ranked(trials) if trial.perplexities]
    if average is not None:
        chosen_from.insert(0, average.perplexities)
    alike = [values for values in chosen_from if len(values) == len(chosen_from[0])]
    return expect_unseen(alike, 0) if alike and len(alike[0]) >= _FEWEST_EXAMPLES else None


def _on_holdout(holdout: HoldoutReport) -> str:
    best = Interval(float(np.mean(holdout.best)), *bootstrap_interval(holdout.best))
    words = f"On the holdout ({holdout.words}), on which nothing was chosen, the best has {best.words()}"
    if not holdout.runner_up:
        return f"{words}."
    second = Interval(float(np.mean(holdout.perplexities)), *bootstrap_interval(holdout.perplexities))
    difference = Interval(*compare(holdout.best, holdout.perplexities))
    if difference.high < 0:
        told = "it is better than"
    elif difference.low > 0:
        told = "it is worse than"
    else:
        told = "it can't be told from"
    return (
        f"{words}, trial {holdout.runner_up} {second.words()}: {told} that one, by {difference.mean:.3g} "
        f"(95 % interval {difference.low:.3g} to {difference.high:.3g})."
    )


def ranked(trials: Sequence[TrialReport]) -> list[TrialReport]:
    """Sort trials by the best value that each reached and, where that is equal, by perplexity."""

    def place(trial: TrialReport) -> tuple[float, float]:
        perplexity = float(np.mean(trial.perplexities)) if trial.perplexities else math.inf
        return (-trial.best if trial.more_is_better else trial.best), perplexity

    return sorted(trials, key=place)
