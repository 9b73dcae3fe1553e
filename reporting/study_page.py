"""Owns a study's page: the tables of the course report, with intervals, beside the report's own figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.files import write_text
from reporting.charts import epoch_curves
from reporting.html import facts, figure, number, page, table, text
from reporting.intervals import bootstrap_interval, compare


@dataclass(frozen=True)
class StudyReport:
    """The content of a study's page.

    found: the results by step. nodes: points of its lineages as stages ("1+1+3"). reported_base,
    reported_stages, reported_kinds: a report's base and perplexities, by stages and by kinds of prompt, if
    there are any. examples: to show, each (instruction, reference, texts by kind). facts: to print.
    """

    name: str
    base: str
    found: Mapping[str, Any]
    nodes: Sequence[str]
    lineages: Sequence[str]
    kinds: Mapping[str, str]
    decodings: Sequence[str]
    reported_base: str | None
    reported_stages: Mapping[str, float]
    reported_kinds: Mapping[str, float]
    examples: Sequence[tuple[str, str, Mapping[str, str]]]
    facts: Mapping[str, Any]


def write_study_page(path: Path, study: StudyReport) -> None:
    """Write the page."""
    sections = [
        f"<h1>Study {text(study.name)}</h1>",
        f"<p>Base: {text(study.base)}. {text(_verdict(study))}</p>",
        "<h2>Stages</h2>",
        _stages(study),
        "<h2>Learning curves</h2>",
        figure(
            epoch_curves(_curves(study, "perplexity", "mean"), "public perplexity"),
            "Public perplexity over epochs; every + begins a stage with a fresh optimizer and schedule.",
        ),
        figure(
            epoch_curves(_curves(study, "text", "chrf"), "chrF"),
            "chrF of texts generated greedily, over epochs.",
        ),
        "<h2>Prompts</h2>",
        _prompts(study),
        "<h2>Beams and sampling</h2>",
        _decodings(study),
        "<h2>Predictions side by side</h2>",
        _predictions(study),
        "<h2>Facts</h2>",
        facts(study.facts),
    ]
    write_text(path, page(f"Study {study.name}", sections))


def _verdict(study: StudyReport) -> str:
    best = study.found["best"]
    ours, zero = (study.found[f"perplexity {name}"]["values"] for name in (best, "zero-shot"))
    _, low, high = compare(ours, zero)
    told = "" if low <= 0 <= high else ", and the difference is not one of the examples drawn"
    mean, zero_mean = (study.found[f"perplexity {name}"]["mean"] for name in (best, "zero-shot"))
    return f"Best after stages {best}: public perplexity {mean:.4g}, zero-shot {zero_mean:.4g}{told}."


def _stages(study: StudyReport) -> str:
    theirs, note = _beside(study, study.reported_stages)
    rows = []
    for node in study.nodes:
        measured, written = study.found[f"perplexity {node}"], study.found[f"text {node}"]
        rows.append(
            [
                node,
                sum(map(int, node.split("+"))),
                number(measured["mean"]),
                _interval(measured["values"]),
                number(study.found[f"train {node}"]["training_loss"]),
                number(written["chrf"]),
                number(written["bleu"]),
                *([number(study.reported_stages.get(node))] if theirs else []),
            ]
        )
    best = list(study.nodes).index(study.found["best"])
    heads = [
        "stages",
        "epochs",
        "public perplexity",
        "95 % interval",
        "training loss",
        "chrF",
        "BLEU",
        *theirs,
    ]
    return table(heads, rows, best, kind="numbers") + note


def _beside(study: StudyReport, reported: Mapping[str, float]) -> tuple[list[str], str]:
    """Return the head of a column with a report's figures, if there are any, and what to say below."""
    if not study.reported_base or not reported:
        return [], ""
    same = study.base.partition("@")[0].rpartition("/")[2] == study.reported_base
    return [f"reported ({study.reported_base})"], "" if same else (
        f'<p class="note">The reported figures are those of another base, {text(study.reported_base)}.</p>'
    )


def _prompts(study: StudyReport) -> str:
    theirs, note = _beside(study, study.reported_kinds)
    rows = []
    for key, label in study.kinds.items():
        measured, written = study.found[f"perplexity {key}"], study.found[f"text {key}"]
        rows.append(
            [
                label,
                number(measured["mean"]),
                _interval(measured["values"]),
                number(written["chrf"]),
                number(written["bleu"]),
                number(written["exact_match"]),
                f"{written['asks_another_question']} of {written['count']}",
                *([number(study.reported_kinds.get(key))] if theirs else []),
            ]
        )
    heads = [
        "prompt",
        "public perplexity",
        "95 % interval",
        "chrF",
        "BLEU",
        "exact",
        "go on to another question",
        *theirs,
    ]
    return table(heads, rows, kind="numbers") + note


def _decodings(study: StudyReport) -> str:
    rows = []
    for name in study.decodings:
        written = study.found[f"text {name}"]
        rows.append(
            [
                name,
                number(written["chrf"]),
                number(written["bleu"]),
                number(written["exact_match"]),
                number(written["rows_per_second"]),
                number(written["num_tokens"] / written["count"]),
                number(written["peak_memory_gib"] or None),
            ]
        )
    return table(
        ["decoding", "chrF", "BLEU", "exact", "rows/s", "new tokens a row", "peak GiB"], rows, kind="numbers"
    )


def _predictions(study: StudyReport) -> str:
    kinds = list(study.kinds.values())
    rows = [
        [instruction, reference, *(texts[kind] for kind in kinds)]
        for instruction, reference, texts in study.examples
    ]
    return table(["instruction", "reference", *kinds], rows, kind="texts")


def _curves(study: StudyReport, step: str, value: str) -> dict[str, list[tuple[float, float]]]:
    curves = {}
    for lineage in study.lineages:
        stages = lineage.split("+")
        names = ["+".join(stages[:end]) for end in range(1, len(stages) + 1)]
        curves[lineage] = [
            (float(sum(map(int, name.split("+")))), float(study.found[f"{step} {name}"][value]))
            for name in names
        ]
    return curves


def _interval(values: Sequence[float]) -> str:
    return "{:.4g} - {:.4g}".format(*bootstrap_interval(values))
