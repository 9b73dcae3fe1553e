"""Owns a sweep's page: one HTML file without scripts, which says which trial is best and how sure that is.

Refuses to know Ray and the tracking server.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qlora.files import write_text
from reporting.charts import Curve, importance_bars, learning_curves, parallel_coordinates
from reporting.html import facts, figure, number, page, table, text
from reporting.intervals import bootstrap_interval
from reporting.verdicts import (
    PERPLEXITY,
    AverageReport,
    HoldoutReport,
    Measure,
    TrialReport,
    outlook,
    ranked,
    verdict,
)

_LOGARITHMIC = {"learning_rate", "lora_r", "lora_alpha"}
_FEWEST_TRIALS = 8  # to say which parameter mattered


@dataclass(frozen=True)
class SweepReport:
    """The content of a sweep's page.

    zero_shot: the base's figure, of the measure that trials are ranked by. epochs_saved: the share of
    full-length epochs that early stopping did not run. registration: what became of the best adapter. facts:
    to print (settings, digests, versions, hardware). starts_at_base: whether fresh adapters were trained,
    which equal the base at first. links: pages of the tracking server, by name. average: if one is best.
    holdout: if there is one.
    """

    name: str
    zero_shot: float
    trials: Sequence[TrialReport]
    epochs_saved: float
    seconds: float
    registration: str
    facts: Mapping[str, Any]
    starts_at_base: bool = True
    links: Mapping[str, str] = field(default_factory=dict)
    average: AverageReport | None = None
    holdout: HoldoutReport | None = None
    measure: Measure = PERPLEXITY


def importance(trials: Sequence[TrialReport]) -> dict[str, float]:
    """Return the share of each searched parameter in explaining the first figure of each trial.

    Under ASHA all trials had spent the same share of their schedules there. Permutation importance in a
    forest of regression trees; empty for too few trials. Source: Breiman 2001,
    https://doi.org/10.1023/A:1010933404324.
    """
    seen = [trial for trial in trials if trial.curve]
    names = _chosen(_searched(seen))
    if len(seen) < _FEWEST_TRIALS or not names:
        return {}
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    inputs = np.array([_places(seen, name)[0] for name in names]).T
    firsts = [trial.curve[0][1] for trial in seen]
    targets = np.array(firsts) if seen[0].more_is_better or min(firsts) <= 0 else np.log(firsts)
    forest = RandomForestRegressor(300, random_state=0).fit(inputs, targets)
    found = permutation_importance(
        forest, inputs, targets, n_repeats=20, random_state=0
    ).importances_mean.clip(0)
    total = found.sum()
    return {name: float(share / total) if total else 0.0 for name, share in zip(names, found, strict=True)}


def write_sweep_page(path: Path, sweep: SweepReport) -> None:
    """Write the page."""
    write_text(path, _page(sweep))


def _page(sweep: SweepReport) -> str:
    order = ranked(sweep.trials)
    seen = [trial for trial in order if trial.curve]
    names = _searched(seen)
    stopped = sum(trial.status == "stopped" and not trial.is_cut for trial in sweep.trials)
    saved = (
        f"early stopping ended {stopped} of them and saved {sweep.epochs_saved:.0%} of the full-length epochs"
    )
    told = verdict(sweep.trials, sweep.zero_shot, sweep.average, sweep.measure)
    sections = [
        f"<h1>Sweep {text(sweep.name)}</h1>",
        f'<p class="verdict">{text(told)}</p>',
        f"<p>{text(outlook(sweep.trials, sweep.average, sweep.holdout, sweep.measure))}</p>",
        f"<p>{len(sweep.trials)} trials in {_clock(sweep.seconds)}{f'; {saved}' if stopped else ''}. "
        f"{text(sweep.registration)}</p>",
        _links(sweep.links),
        "<h2>Ranking</h2>",
        _table(order, names, sweep.measure),
        "<h2>Learning curves</h2>",
        _curves(sweep, seen),
        "<h2>Settings and results</h2>",
        _coordinates(seen, _chosen(names), sweep.measure),
        "<h2>What mattered</h2>",
        _importance(sweep.trials, len(seen)),
        "<h2>Facts</h2>",
        facts(sweep.facts),
    ]
    return page(f"Sweep {sweep.name}", sections)


def _links(links: Mapping[str, str]) -> str:
    if not links:
        return ""
    anchors = [f'<a href="{text(address)}">{text(name)}</a>' for name, address in links.items()]
    return f'<p class="note">In MLflow: {", ".join(anchors)}.</p>'


def _curves(sweep: SweepReport, seen: Sequence[TrialReport]) -> str:
    curves = []
    for place, trial in enumerate(seen):
        percents = [percent for percent, _ in trial.curve]
        values = [value for _, value in trial.curve]
        was_stopped = trial.status == "stopped"
        curves.append(Curve(trial.name, percents, values, was_stopped, place == 0, trial.base))
    words = sweep.measure.words
    are_stopped = any(curve.was_stopped for curve in curves)
    cross = "; a cross is where one was stopped before its end" if are_stopped else ""
    caption = f"{words[0].upper()}{words[1:]} of each trial{cross}."
    is_perplexity = sweep.measure.is_perplexity
    picture = learning_curves(
        curves, sweep.zero_shot, sweep.starts_at_base, words, is_logarithmic=is_perplexity
    )
    return figure(picture, caption)


def _coordinates(seen: Sequence[TrialReport], names: Sequence[str], measure: Measure) -> str:
    columns, labels = {}, {}
    for name in names:
        columns[_label(name)], labels[_label(name)] = _places(seen, name)
    is_perplexity = measure.is_perplexity
    values = [trial.best for trial in seen]
    picture = parallel_coordinates(
        columns, labels, values, 0, measure.words, measure.more_is_better, is_logarithmic=is_perplexity
    )
    caption = f"One line a trial, from its settings to its best {measure.words}; the best trial in front."
    return figure(picture, caption)


def _importance(trials: Sequence[TrialReport], num_seen: int) -> str:
    shares = importance(trials)
    if not shares:
        words = f"Fewer than {_FEWEST_TRIALS} trials with different settings: too few to say."
        return f'<p class="note">{words}</p>'
    caption = (
        f"Share of each setting in explaining the first figure that the {num_seen} trials reported "
        "(random forest, permutation importance). With so few trials this is a hint, not a proof."
    )
    return figure(importance_bars({_label(name): share for name, share in shares.items()}), caption)


def _table(order: Sequence[TrialReport], names: Sequence[str], measure: Measure) -> str:
    has_gpu = any(trial.peak_memory_gib for trial in order)
    heads = [
        "trial",
        "status",
        *map(_label, names),
        "done",
        *([] if measure.is_perplexity else [measure.label]),
        "perplexity",
        "95 % interval",
        "train. loss",
        "tokens/s",
        *(["peak GiB"] if has_gpu else []),
        "time",
    ]
    rows = []
    for trial in order:
        interval = (
            "{:.4g} - {:.4g}".format(*bootstrap_interval(trial.perplexities)) if trial.perplexities else "-"
        )
        percent = trial.curve[-1][0] if trial.curve else 0.0
        rows.append(
            [
                trial.name,
                trial.status,
                *(_value(trial.settings[name]) for name in names),
                f"{percent:.0f}%",
                number(trial.best),
                *([] if measure.is_perplexity else [number(_mean(trial.perplexities))]),
                interval,
                number(trial.training_loss),
                "-" if trial.tokens_per_second is None else f"{trial.tokens_per_second:.0f}",
                *([f"{trial.peak_memory_gib:.1f}"] if has_gpu else []),
                _clock(trial.seconds),
            ]
        )
    failed = "".join(
        f'<p class="note">{text(trial.name)} {text(trial.status)}: {text(trial.reason)}</p>'
        for trial in order
        if trial.status in ("failed", "diverged")
    )
    return table(heads, rows, best=0) + failed


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _searched(trials: Sequence[TrialReport]) -> list[str]:
    """Settings that differ between trials."""
    return [
        name
        for name in (trials[0].settings if trials else ())
        if len({str(trial.settings[name]) for trial in trials}) > 1
    ]


def _chosen(names: Sequence[str]) -> list[str]:
    """Return the settings that people choose: a seed is luck, and says nothing of the next sweep."""
    return [name for name in names if name != "seed"]


def _places(trials: Sequence[TrialReport], name: str) -> tuple[list[float], dict[float, str]]:
    """Return each trial's place on an axis from 0 to 1, and what stands at which place.

    Numbers are placed by size, anything else by name.
    """
    values = [trial.settings[name] for trial in trials]
    if all(isinstance(value, int | float) for value in values):
        scaled = [
            math.log(value) if name in _LOGARITHMIC and min(values) > 0 else float(value) for value in values
        ]
    else:
        order = sorted({str(value) for value in values})
        scaled = [float(order.index(str(value))) for value in values]
    low, high = min(scaled), max(scaled)
    places = [(value - low) / (high - low or 1.0) for value in scaled]
    marks = dict(sorted(zip(places, map(_value, values), strict=True)))
    return places, marks if len(marks) <= 6 else {
        place: text for place, text in marks.items() if place in (0.0, 1.0)
    }


def _label(name: str) -> str:
    return {"lora_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"}.get(name, name.replace("_", " "))


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes}:{second:02d} min" if minutes else f"{second} s"
