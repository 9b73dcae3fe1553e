"""Owns what a sweep tells people besides its summary: its report, and the facts on its runs in the tracking server."""

import getpass
from collections.abc import Mapping
from typing import Any

from qlora.provenance import git_commit, package_versions
from reporting.sweep_page import SweepReport, TrialReport
from tuning.ledger import TrialRecord, share_of_epochs_saved
from tuning.space import REPORTED, Space


def provenance(space: Space, hardware: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """Where a sweep's figures come from, in the words of MLflow's tags where it has some."""
    versions = {f"version.{name}": version for name, version in package_versions().items()}
    return {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": "ray_jobs/tune.py",
        "mlflow.source.git.commit": git_commit(),
        "mlflow.user": getpass.getuser(),
        "hardware": hardware,
        "base_model": space.base_model.name,
        **{f"{role}_digest": digest for role, digest in digests.items()},
        **versions,
    }


def model_card(space: Space, record: TrialRecord, zero_shot: float, digests: Mapping[str, str]) -> str:
    """README.md of an adapter's folder."""
    assert record.best is not None
    found, epochs = record.best["public_perplexity"], record.best["epoch"]
    base, _, revision = space.base_model.name.partition("@")
    named = f"{base}\nbase_model_revision: {revision}" if revision else base
    settings = "\n".join(f"| {key} | {value} |" for key, value in record.config.items())
    return f"""---
library_name: peft
base_model: {named}
tags: [lora, qlora]
---

# LoRA adapter of trial {record.trial_id}

Trained on `{space.data.train}` for the base `{space.base_model.name}` in {space.base_model.quantization}. Public perplexity, the mean over
the examples of `{space.data.public}` of exp(mean NLL of the answer tokens and EOS): **{found:.5g}** after {epochs:g} epochs;
the base alone has {zero_shot:.5g}. Load it with `PeftModel.from_pretrained(base_model, folder)`; prompts are those of the
template `{space.prompt}`.

| setting | value |
|---|---|
{settings}

Digests of the data: train `{digests["train"]}`, public `{digests["public"]}`.
"""


def sweep_report(
    name: str,
    space: Space,
    records: list[TrialRecord],
    zero_shot: float,
    seconds: float,
    registration: str,
    facts: Mapping[str, Any],
    start: str | None = None,
) -> SweepReport:
    """What the report is made of. `facts`: see `provenance`. `start`: the adapter that trials went on from."""
    settings = {
        "continued from": start,
        "search": space.search,
        "scheduler": space.scheduler.model_dump(mode="json"),
        "seed": space.seed,
        "train": f"{space.data.train} ({space.data.train_examples or 'all'} examples)",
        "public": f"{space.data.public} ({space.data.public_examples or 'all'} examples)",
    }
    shown = {
        key.removeprefix("mlflow.source.").removeprefix("version."): value
        for key, value in {**settings, **facts}.items()
        if value is not None and key not in ("mlflow.source.type", "mlflow.user")
    }
    return SweepReport(
        name,
        zero_shot,
        [_trial(record, space) for record in records],
        share_of_epochs_saved(records),
        seconds,
        registration,
        shown,
        start is None,
    )


def _trial(record: TrialRecord, space: Space) -> TrialReport:
    last = record.curve[-1] if record.curve else None
    seconds = record.ended_at - record.started_at if record.ended_at and record.started_at else None
    searched = {key: record.config[key] for key in (*REPORTED, *space.search) if key in record.config}
    return TrialReport(
        record.trial_id,
        searched,
        record.status,
        record.reason,
        [(point["schedule_percent"], point["public_perplexity"]) for point in record.curve],
        record.best_perplexities,
        last["training_loss"] if last else None,
        last["tokens_per_second"] if last else None,
        record.peak_memory_gib,
        seconds,
    )
