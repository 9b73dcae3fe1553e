"""Owns a sweep's folder under results/: its settings, its data, what it found, and its way into the tracking server.

    results/NAME/sweep.json    settings and data digests, written before anything runs; --resume goes by it
    results/NAME/trials/       one record a trial        results/NAME/ray/     Ray Tune's own state and checkpoints
    results/NAME/best/         the best adapter, PEFT    results/NAME/summary.json     the end result
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.adapters import ADAPTER_FILES
from qlora.base_model import base_digest, load_config, load_tokenizer
from qlora.config import InputError
from qlora.data import Example, examples_digest, load_examples
from qlora.files import write_json, write_text
from qlora.perplexity import mean_perplexity
from qlora.prompts import encode_examples, load_prompt, prompt_file
from ray_jobs.command import PROJECT_ROOT
from ray_jobs.starting_point import starting_point
from ray_jobs.sweep_report import model_card, provenance, sweep_report
from tracking.registry import ModelFiles, log_model, register
from tracking.report import verdict, write_report
from tracking.runs import SweepTracker, start_sweep
from tuning.host import SweepData
from tuning.ledger import TrialRecord, share_of_epochs_saved
from tuning.plan import Device, Plan, describe_plan, make_plan, model_size
from tuning.space import REPORTED, Space, load_space
from tuning.sweep import BestAdapter


@dataclass(frozen=True)
class SweepResults:
    """One sweep on disk, `space_file` being where its space was read from; `start`: the adapter that its trials go on from, and where
    that is, if there is one."""

    folder: Path
    space_file: str
    space: Space
    start: tuple[str, Path] | None = None

    @classmethod
    def planned(cls, folder: Path, space_file: str, overrides: list[str], continue_from: str | None = None) -> "SweepResults":
        """A sweep that has not started. Raises InputError for a bad space, a name that is taken, an adapter that doesn't fit."""
        start = starting_point(continue_from) if continue_from else None
        space = load_space(space_file, overrides, start.settings if start else None)
        if start and start.base != space.base_model.name:
            raise InputError("--continue-from", f"{continue_from} belongs to the base {start.base}, not to {space.base_model.name}; "
                             f"add --set base_model.name={start.base}")
        results = cls(folder, space_file, space, (start.name, start.folder) if start else None)
        if results.summary() is not None:
            raise InputError(folder, "holds a finished sweep; choose another --name, or remove the folder to run it again")
        if (folder / "sweep.json").exists():
            raise InputError(folder, f"holds an unfinished sweep; continue it with --resume {folder.name}, or choose another --name")
        return results

    @classmethod
    def reopened(cls, folder: Path) -> "SweepResults":
        """A sweep that was started before. Raises InputError if there is none."""
        try:
            content = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError("--resume", f"there is no sweep {folder.name!r} under {folder.parent.name}/; start it with --space") from None
        started_from = content.get("continue_from")
        return cls(folder, content["space_file"], Space.model_validate(content["space"]),
                   (started_from, folder / "start") if started_from else None)

    def load_data(self) -> SweepData:
        """Both data sets as token ids. Raises InputError for bad data, prompt or base, and for data that changed since the start."""
        train, public = self._examples("train"), self._examples("public")
        prompt = load_prompt(self.space.prompt)
        load_config(self.space.base_model.name)
        tokenizer = load_tokenizer(self.space.base_model.name)
        data = SweepData(self.space, encode_examples(tokenizer, prompt, train, self.space.data.train),
                         encode_examples(tokenizer, prompt, public, self.space.data.public),
                         start={name: (self.start[1] / name).read_bytes() for name in ADAPTER_FILES} if self.start else {})
        if (self.folder / "sweep.json").exists():
            before = json.loads((self.folder / "sweep.json").read_text(encoding="utf-8"))["digests"]
            for role, digest in self._digests().items():
                if before[role] != digest:
                    raise InputError(getattr(self.space.data, role), "changed since the sweep started; "
                                     "start a new sweep under another --name")
        return data

    def plan(self, data: SweepData, device: Device | None, num_devices: int = 1) -> tuple[Plan | None, str]:
        """(the plan for a device, if there is one to plan for; the plan in words). Raises InputError if no trial fits it."""
        size = model_size(load_config(self.space.base_model.name))
        plan = make_plan(self.space, data.train, data.public, size, device, num_devices) if device else None
        return plan, describe_plan(self.space, data.train, data.public, plan)

    def claim(self) -> None:
        """Write sweep.json: from here on the sweep exists and can be resumed."""
        if self.start and self.start[1] != self.folder / "start":
            shutil.copytree(self.start[1], self.folder / "start", dirs_exist_ok=True)
        write_json(self.folder / "sweep.json", {"sweep": self.folder.name, "space_file": self.space_file,
                                                "space": self.space.model_dump(mode="json"), "digests": self._digests(),
                                                "continue_from": self.start[0] if self.start else None})

    def zero_shot(self, measure: Callable[[], list[float]]) -> float:
        """The base's public perplexity, measured once a sweep."""
        path = self.folder / "zero_shot.json"
        if not path.exists():
            write_json(path, {"public_perplexity": mean_perplexity(measure())})
        return json.loads(path.read_text(encoding="utf-8"))["public_perplexity"]

    def tracker(self, hardware: str) -> SweepTracker:
        """The sweep's runs in the tracking server, found again after a restart."""
        parameters = {"space_file": self.space_file, **_flat(self.space.model_dump(mode="json"))}
        data = {role: (getattr(self.space.data, role), self._digests()[role], len(self._examples(role))) for role in ("train", "public")}
        tracker = start_sweep(self.folder.name, self.model_name, parameters, data)
        facts = {**provenance(self.space, hardware, self._digests()), "continued_from": self.start[0] if self.start else None}
        tracker.note(facts, [self.folder / "sweep.json"])
        return tracker

    @property
    def model_name(self) -> str:
        """Of the registered model and the experiment: as the space says, else the space file's name."""
        return self.space.registered_model or Path(self.space_file).stem

    def register(self, records: list[TrialRecord], best: BestAdapter, zero_shot: float, tracker: SweepTracker,
                 prove: Callable[[str, float], None]) -> dict[str, Any]:
        """Log the best adapter and register it if `prove` (given its URI and perplexity) lets it pass; returns the sweep's summary."""
        assert best.record.best is not None
        perplexity, run_id, trial_id = best.record.best["public_perplexity"], tracker.run_id(best.record), best.record.trial_id
        digests = self._digests()
        settings = {"base_model": self.space.base_model.name, "quantization": self.space.base_model.quantization}
        facts = {**settings, "sweep": self.folder.name, "trial_id": trial_id, "prompt": self.space.prompt,
                 "zero_shot_public_perplexity": repr(zero_shot), "train_digest": digests["train"]}
        if self.start:
            facts["continued_from"] = self.start[0]
        if revision := getattr(load_config(settings["base_model"]), "_commit_hash", None):
            facts["base_revision"] = revision
        if digest := base_digest(settings["base_model"]):
            facts["base_digest"] = digest
        write_text(best.folder / "README.md", model_card(self.space, best.record, zero_shot, digests))
        files = ModelFiles(best.folder, prompt_file(self.space.prompt), PROJECT_ROOT / "deploy" / "served_model.py",
                           [PROJECT_ROOT / "qlora", PROJECT_ROOT / "inference"])
        uri = log_model(run_id, files, settings, self._examples("public")[0].instruction,
                        {**facts, "public_digest": digests["public"], "public_perplexity": perplexity})
        prove(uri, perplexity)
        registered = register(self.model_name, uri, run_id, perplexity, digests["public"], facts)
        return {
            "sweep": self.folder.name, "space": self.space_file, "metric": "public_perplexity", "zero_shot": zero_shot,
            "trials": [{**_summary(record), "mlflow_run_id": tracker.run_id(record)} for record in records],
            "best": {"trial_id": trial_id, "public_perplexity": perplexity,
                     "checkpoint": str(best.folder.relative_to(self.folder.parent.parent)),
                     "model_uri": registered.model_uri, "mlflow_run_id": run_id},
            "epochs_saved": share_of_epochs_saved(records),
            "champion": {"is_champion": registered.is_champion, "reason": registered.reason}}

    def publish(self, summary: dict[str, Any], records: list[TrialRecord], best: BestAdapter, zero_shot: float, seconds: float,
                hardware: str, tracker: SweepTracker) -> None:
        """Write report.html and summary.json, which ends the sweep, and bring them to the tracking server."""
        facts = provenance(self.space, hardware, self._digests())
        registration = f"{summary['best']['model_uri']}: {summary['champion']['reason']}."
        report = self.folder / "report.html"
        content = sweep_report(self.folder.name, self.space, records, zero_shot, seconds, registration, facts, self.start and self.start[0])
        write_report(report, content)
        write_json(self.folder / "summary.json", summary)
        words = f"{verdict(content.trials, zero_shot)} Registered as {registration} All of it: artifact report.html."
        found = {"best_trial": best.record.trial_id, "model_uri": summary["best"]["model_uri"], "mlflow.note.content": words}
        checkpoints = {trial: {"checkpoint": path} for trial, path in best.checkpoints.items()}
        tracker.note(found, [report, self.folder / "summary.json"], checkpoints)

    def summary(self) -> dict[str, Any] | None:
        """The content of summary.json; None while the sweep is not finished."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def closing_words(self) -> str:
        """What was found and where to look, for the end of the screen."""
        summary = self.summary()
        assert summary is not None
        best, champion = summary["best"], summary["champion"]
        return "\n".join([
            f"best        trial {best['trial_id']}: public perplexity {best['public_perplexity']:.4f}, "
            f"zero-shot {summary['zero_shot']:.4f}",
            f"registered  {best['model_uri']}, {'now champion' if champion['is_champion'] else 'not champion'}: {champion['reason']}",
            f"adapter     {best['checkpoint']} (a PEFT folder)",
            f"report      results/{self.folder.name}/report.html, summary.json beside it",
            f"compare     make ui, then experiment {self.model_name!r}",
            f"generate    python ray_jobs/batch_infer.py --model models:/{self.model_name}@champion --input FILE --output FILE"])

    def _examples(self, role: str) -> list[Example]:
        limit = getattr(self.space.data, f"{role}_examples")
        return load_examples(getattr(self.space.data, role), need_output=True)[:limit]

    def _digests(self) -> dict[str, str]:
        return {role: examples_digest(self._examples(role)) for role in ("train", "public")}


def _summary(record: TrialRecord) -> dict[str, Any]:
    curve = [{"step": int(point["step"]), "epoch": point["epoch"], "public_perplexity": point["public_perplexity"]}
             for point in record.curve]
    config = {key: record.config[key] for key in REPORTED}
    result = {"trial_id": record.trial_id, "config": config, "status": record.status, "curve": curve}
    return {**result, "error": record.error} if record.error else result


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value})
    return flat
