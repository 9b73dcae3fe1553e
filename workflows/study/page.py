"""Owns how a study's results become its page, its runs, and the last lines on the screen."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.home import in_results
from qlora.provenance import git_commit, package_versions
from reporting.study_page import StudyReport, write_study_page
from tracking.links import pages_root, run_link
from tracking.runs import note_study
from workflows.results import STUDIES
from workflows.study.settings import Study, name_of
from workflows.study.steps import ADAPTER, FEW_SHOT, ZERO_SHOT, PreparedStudy

_EXPERIMENT = "studies"
_TEXT = ("chrf", "bleu", "exact_match", "rows_per_second", "peak_memory_gib", "asks_another_question")


def publish_study(
    name: str, study_id: str | None, folder: Path, prepared: PreparedStudy, found: Mapping[str, Any]
) -> str:
    """Write a study's page and bring it and the results to the tracking server.

    Returns what to tell people.
    """
    study, page = prepared.study, folder / "study.html"
    drawn = random.Random(study.seed).sample(range(len(prepared.sets.public)), study.num_predictions)
    write_study_page(page, study_report(name, prepared, found, sorted(drawn)))
    runs = metrics_of(study, found)
    experiment_id, run_id = note_study(_EXPERIMENT, name, study_id, runs, page)
    best, zero_shot = found["best"], found["perplexity zero-shot"]["mean"]
    perplexity = found[f"perplexity {best}"]["mean"]
    return (
        f"\nbest        stages {best}: public perplexity {perplexity:.4f}, zero-shot {zero_shot:.4f}\n"
        f"adapter     {in_results(STUDIES, name, 'adapters', best)} (a PEFT folder)\n"
        f"page        {in_results(STUDIES, name, 'study.html')}\n"
        f"runs        {run_link(experiment_id, run_id, pages_root())} (make ui serves the embedded store)"
    )


def study_report(
    name: str, prepared: PreparedStudy, found: Mapping[str, Any], chosen: Sequence[int]
) -> StudyReport:
    """Gather what the page is made of; `chosen`: the examples to show."""
    study, best, reported = prepared.study, found["best"], prepared.study.reported
    kinds = {ZERO_SHOT: ZERO_SHOT, FEW_SHOT: f"{study.shots}-shot", best: f"{ADAPTER} ({best})"}
    examples = []
    for index in chosen:
        texts = {label: found[f"text {key}"]["texts"][index] for key, label in kinds.items()}
        example = prepared.sets.public[index]
        examples.append((example.instruction, example.output or "", texts))
    by_prompt = reported.prompts if reported else {}
    return StudyReport(
        name=name,
        base=study.base_model.name,
        found=found,
        nodes=[name_of(stages) for stages in study.nodes()],
        lineages=study.stages,
        kinds=kinds,
        decodings=decodings_of(study),
        reported_base=reported.base if reported else None,
        reported_stages=reported.stages if reported else {},
        reported_kinds={best if key == ADAPTER else key: value for key, value in by_prompt.items()},
        examples=examples,
        facts={
            "commit": git_commit(),
            "train": f"{study.data.train_name} ({len(prepared.sets.train)} examples)",
            "public": f"{study.data.public_name} ({len(prepared.sets.public)} examples)",
            "trial": study.trial,
            "seed": study.seed,
            "engine": found["text zero-shot"]["engine"],
            **package_versions(),
        },
    )


def decodings_of(study: Study) -> list[str]:
    """Name the ways in which the best adapter's texts were made."""
    return [*(f"beams {beams}" for beams in study.beams), "sampling"]


def metrics_of(study: Study, found: Mapping[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
    """Return (parameters, metrics) of every result, for the tracking server."""
    runs = {}
    for name in [*map(name_of, study.nodes()), ZERO_SHOT, FEW_SHOT, *decodings_of(study)]:
        written = found[f"text {name}"]
        metrics = {key: float(written[key]) for key in _TEXT}
        if measured := found.get(f"perplexity {name}"):
            metrics["public_perplexity"] = measured["mean"]
        if trained := found.get(f"train {name}"):
            metrics["training_loss"] = trained["training_loss"]
            metrics["epoch"] = float(sum(map(int, name.split("+"))))
        parameters = {"base_model": study.base_model.name, "result": name, **written["decoding"]}
        runs[name] = (parameters, metrics)
    return runs
