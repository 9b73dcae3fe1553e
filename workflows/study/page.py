"""Owns how a study's results become its page and its runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora.provenance import git_commit, package_versions
from reporting.study_page import StudyReport
from workflows.study.settings import Study, name_of
from workflows.study.steps import ADAPTER, FEW_SHOT, ZERO_SHOT, StudySteps

_TEXT = ("chrf", "bleu", "exact_match", "rows_per_second", "peak_memory_gib", "asks_another_question")


def study_report(
    name: str, steps: StudySteps, found: Mapping[str, Any], chosen: Sequence[int]
) -> StudyReport:
    """What the page is made of; `chosen`: the examples to show."""
    study, best = steps.study, found["best"]
    kinds = {ZERO_SHOT: ZERO_SHOT, FEW_SHOT: f"{study.shots}-shot", best: f"{ADAPTER} ({best})"}
    examples = [
        (
            steps.public[index].instruction,
            steps.public[index].output or "",
            {label: found[f"text {key}"]["texts"][index] for key, label in kinds.items()},
        )
        for index in chosen
    ]
    reported = study.reported
    in_prompts = {
        best if key == ADAPTER else key: value
        for key, value in (reported.prompts if reported else {}).items()
    }
    facts = {
        "commit": git_commit(),
        "train": f"{study.data.train} ({len(steps.train)} examples)",
        "public": f"{study.data.public} ({len(steps.public)} examples)",
        "trial": study.trial,
        "seed": study.seed,
        "engine": found["text zero-shot"]["engine"],
        **package_versions(),
    }
    return StudyReport(
        name,
        study.base_model.name,
        found,
        [name_of(stages) for stages in study.nodes()],
        study.stages,
        kinds,
        decodings_of(study),
        reported.base if reported else None,
        reported.stages if reported else {},
        in_prompts,
        examples,
        facts,
    )


def decodings_of(study: Study) -> list[str]:
    """Names of the ways in which the best adapter's texts were made."""
    return [*(f"beams {beams}" for beams in study.beams), "sampling"]


def metrics_of(study: Study, found: Mapping[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
    """(parameters, metrics) of every result, for the tracking server."""
    runs = {}
    for name in [*(name_of(stages) for stages in study.nodes()), ZERO_SHOT, FEW_SHOT, *decodings_of(study)]:
        measured, written = found.get(f"perplexity {name}"), found[f"text {name}"]
        metrics = {key: float(written[key]) for key in _TEXT}
        if measured:
            metrics["public_perplexity"] = measured["mean"]
        if trained := found.get(f"train {name}"):
            metrics |= {
                "training_loss": trained["training_loss"],
                "epoch": float(sum(map(int, name.split("+")))),
            }
        runs[name] = ({"base_model": study.base_model.name, "result": name, **written["decoding"]}, metrics)
    return runs
