"""Owns what a sweep computes on and finds: its data as token ids, its plan, its best adapter's way into the tracking server."""

import json
from collections.abc import Callable
from typing import Any

from qlora.base.model import load_config, load_tokenizer
from qlora.data.prompts import encode_examples, load_prompt, prompt_file
from qlora.files import write_json, write_text
from qlora.lora.peft_folder import ADAPTER_FILES
from qlora.perplexity import mean_perplexity
from reporting.sweep_page import verdict, write_report
from tracking.registry import ModelFiles, log_model, register
from tracking.runs import SweepTracker, start_sweep
from tuning.device import Device
from tuning.host import SweepData
from tuning.ledger import TrialRecord, share_of_epochs_saved
from tuning.plan import Plan, describe_plan, make_plan, model_size
from tuning.space import REPORTED
from tuning.sweep import BestAdapter
from workflows.session import PROJECT_ROOT
from workflows.sweep.facts import model_card, provenance, sweep_report
from workflows.sweep.folder import SweepFolder


class SweepResults(SweepFolder):
    """What a sweep computes on and finds."""

    @classmethod
    def of(cls, sweep: SweepFolder) -> "SweepResults":
        """The same sweep."""
        return cls(sweep.folder, sweep.space_file, sweep.space, sweep.start)

    def load_data(self) -> SweepData:
        """Both data sets as token ids. Raises InputError for bad data, prompt or base."""
        train, public = self.examples("train"), self.examples("public")
        prompt = load_prompt(self.space.prompt)
        load_config(self.space.base_model.name)
        tokenizer = load_tokenizer(self.space.base_model.name)
        return SweepData(
            self.space,
            encode_examples(tokenizer, prompt, train, self.space.data.train),
            encode_examples(tokenizer, prompt, public, self.space.data.public),
            start={name: (self.start[1] / name).read_bytes() for name in ADAPTER_FILES} if self.start else {},
        )

    def plan(self, data: SweepData, device: Device | None, num_devices: int = 1) -> tuple[Plan | None, str]:
        """(the plan for a device, if there is one to plan for; the plan in words). Raises InputError if no trial fits it."""
        size = model_size(load_config(self.space.base_model.name))
        plan = make_plan(self.space, data.train, data.public, size, device, num_devices) if device else None
        return plan, describe_plan(self.space, data.train, data.public, plan)

    def zero_shot(self, measure: Callable[[], list[float]]) -> float:
        """The base's public perplexity, measured once a sweep."""
        path = self.folder / "zero_shot.json"
        if not path.exists():
            write_json(path, {"public_perplexity": mean_perplexity(measure())})
        return json.loads(path.read_text(encoding="utf-8"))["public_perplexity"]

    def tracker(self, hardware: str) -> SweepTracker:
        """The sweep's runs in the tracking server, found again after a restart."""
        parameters = {"space_file": self.space_file, **_flat(self.space.model_dump(mode="json"))}
        data = {
            role: (getattr(self.space.data, role), self.digests()[role], len(self.examples(role)))
            for role in ("train", "public")
        }
        tracker = start_sweep(self.folder.name, self.model_name, parameters, data)
        facts = {
            **provenance(self.space, hardware, self.digests()),
            "continued_from": self.start[0] if self.start else None,
        }
        tracker.note(facts, [self.folder / "sweep.json"])
        return tracker

    def register(
        self,
        records: list[TrialRecord],
        best: BestAdapter,
        zero_shot: float,
        tracker: SweepTracker,
        base_digest: str | None,
        prove: Callable[[str, float], None],
    ) -> dict[str, Any]:
        """Log the best adapter and register it if `prove` (given its URI and perplexity) lets it pass; returns the sweep's summary.
        `base_digest`: see qlora.base.reference."""
        assert best.record.best is not None
        perplexity, run_id, trial_id = (
            best.record.best["public_perplexity"],
            tracker.run_id(best.record),
            best.record.trial_id,
        )
        digests = self.digests()
        settings = {
            "base_model": self.space.base_model.name,
            "quantization": self.space.base_model.quantization,
        }
        facts = {
            **settings,
            "sweep": self.folder.name,
            "trial_id": trial_id,
            "prompt": self.space.prompt,
            "zero_shot_public_perplexity": repr(zero_shot),
            "train_digest": digests["train"],
        }
        if self.start:
            facts["continued_from"] = self.start[0]
        if revision := getattr(load_config(settings["base_model"]), "_commit_hash", None):
            facts["base_revision"] = revision
        if base_digest:
            facts["base_digest"] = base_digest
        write_text(best.folder / "README.md", model_card(self.space, best.record, zero_shot, digests))
        files = ModelFiles(
            best.folder,
            prompt_file(self.space.prompt),
            PROJECT_ROOT / "deploy" / "served_model.py",
            [PROJECT_ROOT / "qlora", PROJECT_ROOT / "inference"],
        )
        uri = log_model(
            run_id,
            files,
            settings,
            self.examples("public")[0].instruction,
            {**facts, "public_digest": digests["public"], "public_perplexity": perplexity},
        )
        prove(uri, perplexity)
        registered = register(self.model_name, uri, run_id, perplexity, digests["public"], facts)
        return {
            "sweep": self.folder.name,
            "space": self.space_file,
            "metric": "public_perplexity",
            "zero_shot": zero_shot,
            "trials": [{**_summary(record), "mlflow_run_id": tracker.run_id(record)} for record in records],
            "best": {
                "trial_id": trial_id,
                "public_perplexity": perplexity,
                "checkpoint": str(best.folder.relative_to(self.folder.parent.parent)),
                "model_uri": registered.model_uri,
                "mlflow_run_id": run_id,
            },
            "epochs_saved": share_of_epochs_saved(records),
            "champion": {"is_champion": registered.is_champion, "reason": registered.reason},
        }

    def publish(
        self,
        summary: dict[str, Any],
        records: list[TrialRecord],
        best: BestAdapter,
        zero_shot: float,
        seconds: float,
        hardware: str,
        tracker: SweepTracker,
    ) -> None:
        """Write report.html and summary.json, which ends the sweep, and bring them to the tracking server."""
        facts = provenance(self.space, hardware, self.digests())
        registration = f"{summary['best']['model_uri']}: {summary['champion']['reason']}."
        report = self.folder / "report.html"
        content = sweep_report(
            self.folder.name,
            self.space,
            records,
            zero_shot,
            seconds,
            registration,
            facts,
            self.start and self.start[0],
        )
        write_report(report, content)
        write_json(self.folder / "summary.json", summary)
        words = f"{verdict(content.trials, zero_shot)} Registered as {registration} All of it: artifact report.html."
        found = {
            "best_trial": best.record.trial_id,
            "model_uri": summary["best"]["model_uri"],
            "mlflow.note.content": words,
        }
        checkpoints = {trial: {"checkpoint": path} for trial, path in best.checkpoints.items()}
        tracker.note(found, [report, self.folder / "summary.json"], checkpoints)


def _summary(record: TrialRecord) -> dict[str, Any]:
    curve = [
        {"step": int(point["step"]), "epoch": point["epoch"], "public_perplexity": point["public_perplexity"]}
        for point in record.curve
    ]
    config = {key: record.config[key] for key in REPORTED}
    result = {"trial_id": record.trial_id, "config": config, "status": record.status, "curve": curve}
    return {**result, "error": record.error} if record.error else result


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{key}": value}
        )
    return flat
