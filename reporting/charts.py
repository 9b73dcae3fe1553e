"""Owns the pictures of a sweep: inline SVG by matplotlib, without scripts, readable on light and dark paper.

Text and axes take the page's own colour. Refuses to know where numbers come from.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

_INK = "#0a0b0c"  # stands for the page's colour until the picture is written
# Okabe and Ito's, told apart by colour-blind people
_BEST, _OTHER, _STOPPED, _BASE = "#d55e00", "#0072b2", "#7f8c8d", "#009e73"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sweep",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """A trial's curve of what trials are ranked by, over the percent of its own schedule.

    base: where it starts, if the base alone has another value for it than for others.
    """

    name: str
    percents: Sequence[float]
    values: Sequence[float]
    was_stopped: bool
    is_best: bool
    base: float | None = None


def learning_curves(
    curves: Sequence[Curve],
    zero_shot: float,
    start_at_base: bool = True,
    quantity: str = "public perplexity",
    *,
    is_logarithmic: bool = True,
) -> str:
    """Draw all trials, the best one in front, with a cross where one was stopped early.

    Curves begin at the base if that is where the trials start.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(8, 4.2)
        axes.axhline(
            zero_shot, color=_BASE, linestyle="--", linewidth=1.2, label=f"zero-shot {zero_shot:.4g}"
        )
        for curve in sorted(curves, key=lambda curve: curve.is_best):
            colour = _BEST if curve.is_best else _STOPPED if curve.was_stopped else _OTHER
            label = f"best, {curve.name}" if curve.is_best else None
            start = zero_shot if curve.base is None else curve.base
            first = ([0.0], [start]) if start_at_base else ([], [])
            axes.plot(
                [*first[0], *curve.percents],
                [*first[1], *curve.values],
                color=colour,
                linewidth=2.4 if curve.is_best else 1.2,
                marker="o",
                markersize=3,
                alpha=1.0 if curve.is_best else 0.75,
                label=label,
            )
            if curve.was_stopped and curve.percents:
                axes.plot(
                    curve.percents[-1:],
                    curve.values[-1:],
                    marker="x",
                    markersize=8,
                    color=_STOPPED,
                    markeredgewidth=2,
                )
        axes.plot([], [], color=_OTHER, marker="o", markersize=3, label="ran to its end")
        axes.plot([], [], color=_STOPPED, marker="x", markersize=8, markeredgewidth=2, label="stopped early")
        if is_logarithmic:
            _logarithmic(axes)
        axes.set(xlabel="percent of a trial's own schedule", ylabel=quantity, xlim=(0, 103))
        figure.legend(loc="outside upper center", ncols=4, fontsize=9)
        return _svg(figure)


def epoch_curves(curves: Mapping[str, Sequence[tuple[float, float]]], quantity: str) -> str:
    """Draw a quantity over epochs, one line a lineage."""
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(8, 3.2)
        for (name, points), colour in zip(
            curves.items(), (_BEST, _OTHER, _BASE, _STOPPED) * len(curves), strict=False
        ):
            axes.plot(
                [epoch for epoch, _ in points],
                [value for _, value in points],
                color=colour,
                marker="o",
                markersize=4,
                label=name,
            )
        axes.set(xlabel="epochs", ylabel=quantity)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper center", ncols=4, fontsize=9)
        return _svg(figure)


def parallel_coordinates(
    columns: Mapping[str, Sequence[float]],
    labels: Mapping[str, Mapping[float, str]],
    values: Sequence[float],
    best: int,
    quantity: str = "public perplexity",
    more_is_better: bool = False,
    *,
    is_logarithmic: bool = True,
) -> str:
    """Draw one line a trial through an axis for each parameter to the best that it reached of a quantity.

    columns: each trial's place on an axis, from 0 to 1; labels: what stands where. is_logarithmic: of the
    last axis. best: the trial drawn in front.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(8, 3.8)
        scaled = [math.log(value) for value in values] if is_logarithmic else list(values)
        low, high = min(scaled), max(scaled)
        heights = [(value - low) / (high - low or 1.0) for value in scaled]
        places = [*columns.values(), heights]
        goodness = heights if more_is_better else [1 - height for height in heights]
        for trial in sorted(range(len(values)), key=lambda trial: (trial == best, goodness[trial])):
            colour = _BEST if trial == best else mpl.colormaps["viridis"](0.1 + 0.7 * goodness[trial])
            axes.plot(
                range(len(places)),
                [column[trial] for column in places],
                color=colour,
                linewidth=2.6 if trial == best else 1.1,
                alpha=1.0 if trial == best else 0.7,
            )
        ends = {0.0: f"{min(values):.4g}", 1.0: f"{max(values):.4g}"}
        for x, marks in enumerate([*(labels[name] for name in columns), ends]):
            axes.axvline(x, color=_INK, linewidth=0.8)
            for place, text in marks.items():
                axes.annotate(
                    text, (x, place), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center"
                )
        axes.set_xticks(range(len(places)), [*columns, quantity.replace(" ", "\n")])
        axes.set_yticks([])
        axes.set(ylim=(-0.06, 1.06), xlim=(-0.1, len(places) - 0.6))
        axes.spines[:].set_visible(False)
        return _svg(figure)


def importance_bars(shares: Mapping[str, float]) -> str:
    """Draw parameters by their share of what perplexity's differences are explained by."""
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(8, 0.6 + 0.42 * len(shares))
        names = sorted(shares, key=lambda name: shares[name])
        bars = axes.barh(names, [shares[name] for name in names], color=_OTHER)
        axes.bar_label(bars, [f" {shares[name]:.0%}" for name in names], fontsize=9)
        axes.set(xlim=(0, 1.08))
        axes.set_xticks([])
        axes.spines[["bottom", "left"]].set_visible(False)
        axes.tick_params(left=False)
        return _svg(figure)


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter() if high / low < 12 else NullFormatter())


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    metadata: dict[str, Any] = {"Date": None, "Creator": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
