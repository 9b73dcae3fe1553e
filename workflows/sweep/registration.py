"""Owns a sweep's way into the tracking server: its runs, its adapter's registration, its summary and page."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora.config import TrialData
from qlora.data.chat import ChatPrompt
from qlora.data.prompts import prompt_text
from qlora.data.split import write_keys
from qlora.files import write_json, write_text
from qlora.home import PROJECT_ROOT
from reporting.verdicts import outlook, verdict
from tracking.links import pages_root
from tracking.logged_model import ModelFiles, log_model, withdraw_model
from tracking.registry import Registration, register
from tracking.runs import describe_sweep, start_sweep
from tracking.sweep_tracker import SweepTracker
from tracking.views import save_comparison
from tuning.best_adapter import BestAdapter
from tuning.ledger import TrialRecord, share_of_epochs_saved
from tuning.objective import VALUE
from tuning.space import REPORTED
from workflows.session import FailedError
from workflows.sweep.closing import cost_lines, summary_links
from workflows.sweep.facts import model_card, provenance, sweep_report
from workflows.sweep.folder import SweepFolder
from workflows.sweep.holdout import Holdout
from workflows.sweep.prepared import PreparedSweep
from workflows.sweep.zero_shot import ZeroShot

_TRAINED_ON = "trained_on.bin"


@dataclass(frozen=True)
class Found:
    """Holds what a sweep found: its trials, the best adapter, what it has on the holdout if there is one.

    zero_shot: of the base alone. prompt: the name of the best adapter's.
    """

    records: Sequence[TrialRecord]
    best: BestAdapter
    holdout: Holdout | None
    zero_shot: ZeroShot
    prompt: str

    @property
    def base_perplexity(self) -> float:
        """Return the base's public perplexity under the best adapter's prompt."""
        return self.zero_shot.perplexity(self.prompt)

    def figures(self) -> dict[str, float]:
        """Return the objective's values of the best adapter and of the base; none for public perplexity."""
        objective, best = self.zero_shot.objective, self.best.record.best
        if objective.is_perplexity or best is None:
            return {}
        return {
            "objective": objective.value_at(best),
            "zero_shot_objective": self.zero_shot.value(self.prompt),
        }

    def metrics(self) -> dict[str, float]:
        """Return what is measured on the sweep's run."""
        figures = {
            ("best_" if key == "objective" else "") + key: value for key, value in self.figures().items()
        }
        return {
            "best_public_perplexity": self.best.public_perplexity,
            "zero_shot_public_perplexity": self.base_perplexity,
            "system/epochs_saved": share_of_epochs_saved(self.records),
            **figures,
            **(self.holdout.metrics() if self.holdout is not None else {}),
        }


def track(sweep: SweepFolder) -> SweepTracker:
    """Start the sweep's run in the tracking server, or find it again after a restart."""
    return start_sweep(sweep.name, sweep.sweep_id, sweep.model_name)


def describe(sweep: SweepFolder, prepared: PreparedSweep, hardware: str, tracker: SweepTracker) -> None:
    """Tell the tracking server what the sweep works on, and where."""
    inputs, data = prepared.inputs, sweep.space.data
    parameters = {"space_file": sweep.space_file, **_flat(sweep.space.model_dump(mode="json"))}
    examples = {
        "train": (data.train_name, inputs.digests["train"], len(inputs.sets.train)),
        "public": (data.public_name, inputs.digests["public"], len(inputs.sets.public)),
    }
    if inputs.sets.holdout:
        examples["holdout"] = (data.holdout_name, inputs.digests["holdout"], len(inputs.sets.holdout))
    describe_sweep(tracker, parameters, examples)
    facts = provenance(sweep.space, hardware, inputs.digests)
    continued_from = sweep.start[0] if sweep.start else None
    tracker.note({**facts, "continued_from": continued_from}, [sweep.folder / "sweep.json"])


def register_best(
    sweep: SweepFolder,
    prepared: PreparedSweep,
    found: Found,
    tracker: SweepTracker,
    base_digest: str | None,
    prove: Callable[[str, float], None],
) -> Registration:
    """Log the best adapter and register it if `prove` (given its URI and perplexity) lets it pass.

    `base_digest`: see qlora.base.reference. Raises what `prove` raises; what was logged is then withdrawn.
    """
    space, digests = sweep.space, prepared.inputs.digests
    best, holdout, zero_shot = found.best, found.holdout, found.base_perplexity
    objective = space.objective
    judged = {
        "objective": objective.name,
        "objective_mode": "max" if objective.more_is_better else "min",
        "objective_max_new_tokens": str(objective.max_new_tokens),
        "objective_digest": digests.get("objective"),
        **{f"{key}_value": repr(value) for key, value in found.figures().items()},
    }
    perplexity, run_id = best.public_perplexity, _run_id(best, tracker)
    prompt = prepared.prompt_of(best.record.config)
    is_chat = isinstance(prompt, ChatPrompt)
    settings = {"base_model": space.base_model.name, "quantization": space.base_model.quantization}
    facts = {
        **settings,
        "sweep": sweep.name,
        "trial_id": ", ".join(best.weights),
        "prompt": prompt.name,
        "prompt_kind": "chat" if is_chat else "template",
        "zero_shot_public_perplexity": repr(zero_shot),
        "train_digest": digests["train"],
        "prompt_digest": prompt.digest,
        "tokenizer_digest": prepared.base.tokenizer_digest,
        "template_digest": prepared.base.template_digest if is_chat else None,
        "continued_from": sweep.start[0] if sweep.start else None,
        "base_revision": prepared.base.revision,
        "base_digest": base_digest,
        "weights_digest": digests.get("base_weights") if _are_known(sweep) else None,
        "max_length": str(prepared.base.max_length),
        **(holdout.facts() if holdout is not None else {}),
        **({} if objective.is_perplexity else judged),
    }
    known = {key: value for key, value in facts.items() if value}
    card = model_card(space, best, zero_shot, digests, prompt.name)
    write_text(best.folder / "README.md", card)
    sweep.keep_prompt(prompt_text(prompt))
    trained_on = max(len(prepared.examples.of(record.config).train) for record in best.members)
    write_keys(sweep.folder / _TRAINED_ON, prepared.inputs.sets.train[:trained_on])
    files = ModelFiles(
        adapter=best.folder,
        prompt=sweep.prompt_file,
        trained_on=sweep.folder / _TRAINED_ON,
        script=PROJECT_ROOT / "deploy" / "served_model.py",
        code=[PROJECT_ROOT / "qlora", PROJECT_ROOT / "inference"],
    )
    metadata = {**known, "public_digest": digests["public"], "public_perplexity": perplexity}
    uri = log_model(run_id, files, settings, prepared.inputs.sets.public[0].instruction, metadata)
    try:
        prove(uri, perplexity)
    except FailedError:
        withdraw_model(run_id, uri)  # or every resume would find it again
        raise
    return register(sweep.model_name, uri, run_id, perplexity, digests["public"], known)


def summarise(
    sweep: SweepFolder, found: Found, tracker: SweepTracker, registered: Registration
) -> dict[str, Any]:
    """Return the sweep's summary, as summary.json has it."""
    best, records, holdout = found.best, found.records, found.holdout
    objective = sweep.space.objective
    settings = list(dict.fromkeys([*REPORTED, *sweep.space.search]))
    return {
        "sweep": sweep.name,
        "space": sweep.space_file,
        "metric": objective.name,
        "mode": "max" if objective.more_is_better else "min",
        "zero_shot": found.base_perplexity,
        "trials": [{**_trial(record), "mlflow_run_id": tracker.run_id(record)} for record in records],
        "best": {
            "trial_id": best.record.trial_id if best.soup is None else None,
            "trial_ids": list(best.weights),
            "weights": list(best.weights.values()),
            "members": [asdict(member) for member in best.soup.members] if best.soup else None,
            "public_perplexity": best.public_perplexity,
            **found.figures(),
            "checkpoint": str(best.folder.relative_to(sweep.folder.parent.parent)),
            "model_uri": registered.model_uri,
            "mlflow_run_id": _run_id(best, tracker),
        },
        "holdout": holdout.summary() if holdout is not None else None,
        "epochs_saved": share_of_epochs_saved(records),
        "champion": {"is_champion": registered.is_champion, "reason": registered.reason},
        "mlflow_experiment_id": tracker.experiment_id,
        "mlflow_run_id": tracker.parent_run_id,
        "mlflow_view": save_comparison(
            tracker.experiment_id,
            sweep.name,
            tracker.parent_run_id,
            settings,
            objective.words,
            more_is_better=objective.more_is_better,
        ),
    }


def publish(
    sweep: SweepFolder,
    prepared: PreparedSweep,
    summary: dict[str, Any],
    found: Found,
    seconds: float,
    hardware: str,
    tracker: SweepTracker,
) -> None:
    """Write report.html, and bring it and the summary to the tracking server."""
    facts = provenance(sweep.space, hardware, prepared.inputs.digests)
    facts |= {"what hosts noted": "; ".join(summary["host_notes"]) or None, **cost_lines(summary)}
    uri, best = summary["best"]["model_uri"], found.best
    registration = f"{uri}: {summary['champion']['reason']}."
    report = sweep.folder / "report.html"
    links = summary_links(summary, pages_root())
    from reporting.sweep_page import write_sweep_page  # with matplotlib

    words = prepared.inputs.sets.words
    measured = found.holdout.report(words["holdout"]) if found.holdout is not None else None
    content = sweep_report(
        sweep,
        found.records,
        best.soup,
        measured,
        found.zero_shot,
        found.prompt,
        seconds,
        registration,
        facts,
        links,
    )
    write_sweep_page(report, content)
    pages = ", ".join(f"[{name}]({link})" for name, link in summary_links(summary, "").items())
    told = verdict(content.trials, content.zero_shot, content.average, content.measure)
    expected = outlook(content.trials, content.average, measured, content.measure)
    told = f"{told} {expected} Registered as {registration}\n\n{pages}; artifact report.html."
    tags = {
        "best_trial": ", ".join(best.weights),
        "model_uri": uri,
        "mlflow.note.content": told,
        "host_notes": facts["what hosts noted"],
    }
    checkpoints = {trial: {"checkpoint": path} for trial, path in best.checkpoints.items()}
    # In the sweep's own folder it would say that the sweep is finished.
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "summary.json", summary, "summary to log")
        tracker.note(tags, [report, Path(folder) / "summary.json"], checkpoints)


def _are_known(sweep: SweepFolder) -> bool:
    """Tell whether the base's weights are known to be those that the sweep began with."""
    return not sweep.digests or "base_weights" in sweep.digests


def _run_id(best: BestAdapter, tracker: SweepTracker) -> str:
    """Return the run that the best adapter belongs to: its trial's, or for an average the sweep's own."""
    return tracker.run_id(best.record) if best.soup is None else tracker.parent_run_id


def _trial(record: TrialRecord) -> dict[str, Any]:
    shown = ("epoch", "public_perplexity", VALUE)
    curve = [
        {"step": int(point["step"]), **{key: point[key] for key in shown if key in point}}
        for point in record.curve
    ]
    found = {
        "trial_id": record.trial_id,
        "config": {
            key: record.config[key] for key in (*REPORTED, *TrialData.model_fields) if key in record.config
        },
        "status": record.status,
        "curve": curve,
    }
    if record.cloned_from:
        found["cloned_from"] = record.cloned_from
    return {**found, "error": record.error} if record.error else found


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
