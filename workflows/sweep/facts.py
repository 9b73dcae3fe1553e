"""Owns what a sweep tells of itself besides its summary: provenance, its adapter's card, its page."""

import getpass
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora.base.reference import split_revision
from qlora.provenance import git_commit, package_versions
from reporting.verdicts import AverageReport, HoldoutReport, Measure, TrialReport
from tuning.best_adapter import BestAdapter
from tuning.ledger import TrialRecord, share_of_epochs_saved
from tuning.soup import Soup
from tuning.space import REPORTED, Space
from workflows.sweep.folder import SweepFolder
from workflows.sweep.zero_shot import ZeroShot

if TYPE_CHECKING:
    from reporting.sweep_page import SweepReport


def provenance(space: Space, hardware: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return where a sweep's figures come from, in the words of MLflow's tags where it has some."""
    return {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": "ray_jobs/tune.py",
        "mlflow.source.git.commit": git_commit(),
        "mlflow.user": user_name(),
        "hardware": hardware,
        "base_model": space.base_model.name,
        **{f"{role}_digest": digest for role, digest in digests.items()},
        **{f"version.{name}": version for name, version in package_versions().items()},
    }


def user_name() -> str:
    """Return who runs this process: by name, or by number where the system knows no name.

    Many containers run as a user without a passwd entry.
    """
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def model_card(
    space: Space, best: BestAdapter, zero_shot: float, digests: Mapping[str, str], prompt: str
) -> str:
    """Write README.md of an adapter's folder."""
    names = ", ".join(best.weights)
    title = f"trial {names}" if best.soup is None else f"the average of trials {names}"
    base, revision = split_revision(space.base_model.name)
    named = f"{base}\nbase_model_revision: {revision}" if revision else base
    heads, columns = ["setting", "value"], [(best.record, best.record.best)]
    if best.soup is not None:
        records = {record.trial_id: record for record in best.members}
        columns = [
            (records[one.trial_id], records[one.trial_id].point_at(one.step)) for one in best.soup.members
        ]
        heads = ["setting", *(one.trial_id for one in best.soup.members)]
    rows = [[key, *(record.config[key] for record, _ in columns)] for key in best.record.config]
    if best.soup is not None:
        rows.insert(0, ["weight", *(f"{one.weight:.4g}" for one in best.soup.members)])
    epochs = [f"{point['epoch']:g}" if point else "" for _, point in columns]
    lines = [heads, ["---"] * len(heads), *rows, ["epochs of the checkpoint", *epochs]]
    settings = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    return f"""---
library_name: peft
base_model: {named}
tags: [lora, qlora]
---

# LoRA adapter of {title}

Trained on `{space.data.train_name}` for the base `{space.base_model.name}` in
{space.base_model.quantization}. Public perplexity, the mean over the examples of
`{space.data.public_name}` of exp(mean NLL of the answer tokens and EOS): **{best.public_perplexity:.5g}**;
the base alone has {zero_shot:.5g}. Load it with `PeftModel.from_pretrained(base_model, folder)`; prompts are
those of `{prompt}`.

{settings}

Digests of the data: train `{digests["train"]}`, public `{digests["public"]}`.
"""


def sweep_report(
    sweep: SweepFolder,
    records: Sequence[TrialRecord],
    soup: Soup | None,
    holdout: HoldoutReport | None,
    zero_shot: ZeroShot,
    prompt: str,
    seconds: float,
    registration: str,
    facts: Mapping[str, Any],
    links: Mapping[str, str],
) -> "SweepReport":
    """Gather what the page is made of. `soup`: if an average is best. `facts`: see `provenance`.

    `prompt`: the name of the best adapter's.
    """
    from reporting.sweep_page import SweepReport  # with matplotlib

    space, data = sweep.space, sweep.space.data
    objective = space.objective
    measure = Measure()
    if not objective.is_perplexity:
        measure = Measure(objective.words, objective.label, objective.more_is_better)
    settings = {
        "continued from": sweep.start[0] if sweep.start else None,
        "search": space.search,
        "scheduler": space.scheduler.model_dump(mode="json"),
        "objective": None if objective.is_perplexity else objective.name,
        "seed": space.seed,
        "train": f"{data.train_name} ({data.train_examples or 'all'} examples)",
        "public": f"{data.public_name} ({data.public_examples or 'all'} examples)",
        "holdout": data.holdout_name or None,
    }
    shown = {
        key.removeprefix("mlflow.source.").removeprefix("version."): value
        for key, value in {**settings, **facts}.items()
        if value is not None and key not in ("mlflow.source.type", "mlflow.user")
    }
    return SweepReport(
        name=sweep.name,
        zero_shot=zero_shot.value(prompt),
        trials=[_trial(record, space, zero_shot) for record in records],
        average=AverageReport(tuple(soup.weights), soup.perplexities) if soup is not None else None,
        epochs_saved=share_of_epochs_saved(records),
        seconds=seconds,
        registration=registration,
        facts=shown,
        starts_at_base=sweep.start is None,
        links=links,
        holdout=holdout,
        measure=measure,
    )


def _trial(record: TrialRecord, space: Space, zero_shot: ZeroShot) -> TrialReport:
    last = record.curve[-1] if record.curve else None
    return TrialReport(
        name=record.trial_id,
        settings={key: record.config[key] for key in (*REPORTED, *space.search) if key in record.config},
        status=record.status,
        reason=record.reason,
        curve=[(point["schedule_percent"], space.objective.value_at(point)) for point in record.curve],
        perplexities=record.best_perplexities,
        training_loss=last["training_loss"] if last else None,
        tokens_per_second=last["tokens_per_second"] if last else None,
        peak_memory_gib=record.peak_memory_gib,
        seconds=record.ended_at - record.started_at if record.ended_at and record.started_at else None,
        is_cut=record.is_cut,
        more_is_better=space.objective.more_is_better,
        base=zero_shot.value(record.config["prompt"]) if "prompt" in record.config else None,
    )
