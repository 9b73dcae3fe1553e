"""Owns what is told of sweeps that were played: how long until they are near the best, regret, its picture.

Regret is the logarithm of the best public perplexity so far over the best there is: 0.01 is 1 %.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.search_table.replay import Played

NEAR = 1.01  # of the best
NOISE = 0.002  # what seeds of one configuration differ by
_BUDGETS = (30, 60, 120, 240)
_WORST = 1e3  # perplexity that stands for none
_COLOURS = ("#7f8c8d", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")


def regrets(played: Sequence[Played], best: float, seconds: float) -> "np.ndarray[Any, Any]":
    """Return the regret of each sweep after so many GPU-seconds."""
    return np.array([math.log(min(one.best_at(seconds), _WORST) / best) for one in played])


def summary(played: Sequence[Played], best: float) -> dict[str, float]:
    """Return GPU-seconds until sweeps are near the best, and their regret at some budgets.

    A sweep that never came there counts with its whole time; `reached` is the share of those that did.
    """
    near = best * NEAR
    seconds = np.array([min(one.seconds_to(near), one.ended) for one in played])
    found = {
        "reached": sum(math.isfinite(one.seconds_to(near)) for one in played) / len(played),
        "median_seconds": round(float(np.median(seconds)), 1),
        "p90_seconds": round(float(np.quantile(seconds, 0.9)), 1),
    }
    for budget in _BUDGETS:
        of_budget = regrets(played, best, budget)
        found[f"median_regret_at_{budget}"] = round(float(np.median(of_budget)), 4)
        found[f"p90_regret_at_{budget}"] = round(float(np.quantile(of_budget, 0.9)), 4)
    return found


def worst_ratio(ours: Sequence[Played], baseline: Sequence[Played], best: float) -> tuple[float, int]:
    """Return the largest ratio of 90th percentiles of regret over all whole seconds, and at which.

    Seconds are from the baseline's first result on, to where both have all that they will find. Regrets below
    the noise between seeds count as that.
    """
    begin = math.ceil(float(np.quantile([one.seconds[0] for one in baseline], 0.9)))
    end = math.ceil(max(one.ended for one in (*ours, *baseline)))

    def ninth(played: Sequence[Played], seconds: int) -> float:
        return max(NOISE, float(np.quantile(regrets(played, best, seconds), 0.9)))

    return max((ninth(ours, second) / ninth(baseline, second), second) for second in range(begin, end + 1))


def draw(found: Mapping[str, Sequence[Played]], best: float, path: Path) -> None:
    """Draw the median regret of each, and its 90th percentile, over GPU-seconds."""
    seconds = range(1, 301)
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for (name, played), colour in zip(found.items(), _COLOURS, strict=False):
            values = np.array([regrets(played, best, second) for second in seconds])
            middle, ninth = np.maximum(np.quantile(values, (0.5, 0.9), axis=1), NOISE / 2)
            axes.plot(seconds, middle, color=colour, linewidth=2, label=name)
            axes.fill_between(seconds, middle, ninth, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(math.log(NEAR), color="#555555", linestyle="--", linewidth=1)
        axes.annotate("1 % above the best", (300, math.log(NEAR)), ha="right", va="bottom", fontsize=9)
        axes.set(yscale="log", xlim=(0, 300), ylim=(NOISE / 2, 3), xlabel="GPU-seconds")
        axes.set_ylabel("log of best perplexity so far / best there is")
        axes.legend(frameon=False)
        figure.savefig(path)
