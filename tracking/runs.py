"""Owns the runs of sweeps and studies in MLflow: one parent each, one child a trial or result.

Runs are found again by an id of the sweep's own, so that a restored sweep goes on in the same runs, and one
that is run again under an old name never does. Refuses to know Ray.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from qlora.config import parse_stages

PROJECT_ROOT = Path(__file__).resolve().parent.parent
STAGES = "stages"  # a trial's epochs as a list: parallel axes take "1+1" and "2" for a text and a number
_SWEEP, _SWEEP_ID, _TRIAL, _STATUS = "sweep", "sweep_id", "trial_id", "trial_status"
_PARENT = "mlflow.parentRunId"
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # how MLflow's pages know what to open with
# What people compare stands in front. MLflow's pages draw the group `system` last, in a tab of its own.
_COMPARED = ("public_perplexity", "training_loss")
_BEHIND = ("epoch", "schedule_percent", "learning_rate", "tokens_per_second", "peak_memory_gib")
_TERMINAL = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}


class TrialRecord(Protocol):
    """The part of a trial's record that is logged."""

    @property
    def trial_id(self) -> str:
        """Return Ray Tune's id of the trial."""

    @property
    def config(self) -> dict[str, Any]:
        """Return all settings of the trial."""

    @property
    def status(self) -> str:
        """Return how the trial stands: pending, running, finished, stopped or failed."""

    @property
    def curve(self) -> tuple[dict[str, float], ...]:
        """Return one point an evaluation, by ascending step."""

    @property
    def best(self) -> dict[str, float] | None:
        """Return the point with the lowest public perplexity."""

    @property
    def reason(self) -> str:
        """Say why the trial ended before its time."""


def tracking_uri() -> str:
    """Return $MLFLOW_TRACKING_URI, else the SQLite store under the project's mlruns/."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{PROJECT_ROOT / 'mlruns' / 'mlflow.db'}"


def connect() -> MlflowClient:
    """Return a client of the tracking server, whose schema is created or migrated on first use."""
    uri = tracking_uri()
    (PROJECT_ROOT / "mlruns").mkdir(exist_ok=True)
    mlflow.set_tracking_uri(uri)  # for what MLflow calls in itself
    return MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)


def ensure_experiment(client: MlflowClient, name: str) -> str:
    """Return the id of an experiment, created if need be, whose pages open on runs.

    A local store keeps artifacts under mlruns/artifacts.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        local = tracking_uri().startswith("sqlite:")
        artifacts = (PROJECT_ROOT / "mlruns" / "artifacts").as_uri() if local else None
        return client.create_experiment(name, artifact_location=artifacts, tags=_KIND)
    for key, value in _KIND.items():
        if key not in found.tags:
            client.set_experiment_tag(found.experiment_id, key, value)
    return found.experiment_id


@dataclass
class SweepTracker:
    """Follows a sweep's trials into MLflow.

    A child's metrics are drawn over optimizer steps; those whose name begins with `epoch_` over whole epochs,
    the training loss being the mean of the epoch's.
    """

    experiment_id: str
    sweep: str
    parent_run_id: str
    run_ids: dict[str, str] = field(default_factory=dict)
    logged_steps: dict[str, float] = field(default_factory=dict)

    def trial_changed(self, record: TrialRecord) -> None:
        """Bring a trial's run up to its record: create it, log its newest point, or end it."""
        client, run_id = connect(), self.run_id(record)
        newest = record.curve[-1] if record.curve else None
        if newest is not None and newest["step"] > self.logged_steps[record.trial_id]:
            self.logged_steps[record.trial_id] = newest["step"]
            client.log_batch(run_id, metrics=_metrics(record))
        client.set_tag(run_id, _STATUS, record.status)
        if record.reason:
            client.set_tag(run_id, "reason", record.reason[:5000])
        if record.status in _TERMINAL:
            client.set_terminated(run_id, _TERMINAL[record.status])
        else:
            client.update_run(run_id, status="RUNNING")

    def run_id(self, record: TrialRecord) -> str:
        """Return the child run of a trial, created with its parameters if there is none yet."""
        if record.trial_id not in self.run_ids:
            client = connect()
            known = {_PARENT: self.parent_run_id, _TRIAL: record.trial_id}
            found = _find_run(client, self.experiment_id, known)
            if found is None:
                name, tags = f"{self.sweep}-{record.trial_id}", {_SWEEP: self.sweep, **known}
                found = client.create_run(self.experiment_id, run_name=name, tags=tags)
                stages = list(parse_stages(record.config["epochs"]))
                _log_params(client, found.info.run_id, {**record.config, STAGES: stages}, "ray_jobs/tune.py")
            self.run_ids[record.trial_id] = found.info.run_id
            history = client.get_metric_history(found.info.run_id, "public_perplexity")
            self.logged_steps[record.trial_id] = max((metric.step for metric in history), default=-1)
        return self.run_ids[record.trial_id]

    def note(
        self,
        facts: Mapping[str, Any],
        files: Sequence[Path] = (),
        trial_tags: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Log tags and files of the sweep, and tags of trials by their ids."""
        client = connect()
        tags = [RunTag(key, str(value)[:5000]) for key, value in facts.items() if value is not None]
        client.log_batch(self.parent_run_id, tags=tags)
        for file in files:
            client.log_artifact(self.parent_run_id, str(file))
        for trial_id, more in (trial_tags or {}).items():
            client.log_batch(self.run_ids[trial_id], tags=[RunTag(key, value) for key, value in more.items()])

    @contextmanager
    def system_metrics(self) -> Iterator[None]:
        """Draw, within, this machine's load, memory and GPUs on the parent run, every ten seconds."""
        monitor = SystemMetricsMonitor(self.parent_run_id, resume_logging=True, tracking_uri=tracking_uri())
        monitor.collect_metrics()
        monitor.publish_metrics(monitor.aggregate_metrics())  # now, not only after the first interval
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    def end(self, status: str, metrics: Mapping[str, float]) -> None:
        """End the parent run with FINISHED, FAILED or KILLED, and what was left running with KILLED."""
        client = connect()
        for key, value in metrics.items():
            client.log_metric(self.parent_run_id, key, value)
        left_running = f"tags.`{_PARENT}` = '{self.parent_run_id}' and attributes.status = 'RUNNING'"
        for child in client.search_runs([self.experiment_id], left_running):
            client.set_terminated(child.info.run_id, "KILLED")
        client.set_terminated(self.parent_run_id, status)


def start_sweep(
    sweep: str,
    sweep_id: str | None,
    experiment: str,
    parameters: Mapping[str, Any],
    data: Mapping[str, tuple[str, str, int]],
) -> SweepTracker:
    """Return a tracker with its parent run: the one that this sweep already has, else a new one.

    `sweep_id`: of this very sweep; None for one from before sweeps had ids, which is found by its name.
    `data` maps a context (train, public) to (path, digest, number of examples).
    """
    client = connect()
    experiment_id = ensure_experiment(client, experiment)
    known = {_SWEEP_ID: sweep_id} if sweep_id else {_SWEEP: sweep}
    parent = _find_run(client, experiment_id, {**known, "kind": "sweep"})
    if parent is None:
        tags = {**known, _SWEEP: sweep, "kind": "sweep"}
        parent = client.create_run(experiment_id, run_name=sweep, tags=tags)
        _log_params(client, parent.info.run_id, parameters, "ray_jobs/tune.py")
        client.log_inputs(parent.info.run_id, [_dataset(context, *facts) for context, facts in data.items()])
    client.update_run(parent.info.run_id, status="RUNNING")
    return SweepTracker(experiment_id, sweep, parent.info.run_id)


def note_study(
    experiment: str,
    study: str,
    study_id: str | None,
    runs: Mapping[str, tuple[Mapping[str, Any], Mapping[str, float]]],
    page: Path,
) -> tuple[str, str]:
    """Log a parent run of a study with its page, and a finished child a result.

    `runs`: (parameters, metrics) by name. What is there already is found again. `study_id`: as `start_sweep`
    has it. Returns (experiment id, parent run id).
    """
    client = connect()
    experiment_id = ensure_experiment(client, experiment)
    known = {"study_id": study_id} if study_id else {"study": study}
    parent = _find_run(client, experiment_id, {**known, "kind": "study"})
    if parent is None:
        tags = {**known, "study": study, "kind": "study"}
        parent = client.create_run(experiment_id, run_name=study, tags=tags)
    for name, (parameters, metrics) in runs.items():
        known = {_PARENT: parent.info.run_id, "result": name}
        if _find_run(client, experiment_id, known) is None:
            child = client.create_run(
                experiment_id, run_name=f"{study}: {name}", tags={"study": study, **known}
            )
            _log_params(client, child.info.run_id, parameters, "ray_jobs/study.py")
            for key, value in metrics.items():
                client.log_metric(child.info.run_id, key, value)
            client.set_terminated(child.info.run_id, "FINISHED")
    client.log_artifact(parent.info.run_id, str(page))
    client.set_terminated(parent.info.run_id, "FINISHED")
    return experiment_id, parent.info.run_id


def _metrics(record: TrialRecord) -> list[Metric]:
    """Return what is logged of a record's newest point."""
    newest, now_ms = record.curve[-1], time.time_ns() // 1_000_000
    values = {key: newest[key] for key in _COMPARED}
    if record.best is not None:
        values["best_public_perplexity"] = record.best["public_perplexity"]
    values |= {f"system/{key}": newest[key] for key in _BEHIND}
    found = [Metric(key, value, now_ms, int(newest["step"])) for key, value in values.items()]
    of_epoch = _at_epochs_end(record.curve)
    return found + [Metric(key, value, now_ms, round(newest["epoch"])) for key, value in of_epoch.items()]


def _at_epochs_end(curve: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return what is drawn over epochs, if the newest point is at the end of one."""
    newest = curve[-1]
    if abs(newest["epoch"] - round(newest["epoch"])) > 1e-9:
        return {}
    starts = [0.0, *(point["step"] for point in curve)]
    loss_sum = num_steps = 0.0
    for start, point in zip(starts, curve, strict=False):
        if point["epoch"] > newest["epoch"] - 1:
            loss_sum += point["training_loss"] * (point["step"] - start)
            num_steps += point["step"] - start
    return {
        "epoch_public_perplexity": newest["public_perplexity"],
        "epoch_training_loss": loss_sum / num_steps,
    }


def _find_run(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> Run | None:
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_runs([experiment_id], query, max_results=1)
    return found[0] if found else None


def _log_params(client: MlflowClient, run_id: str, parameters: Mapping[str, Any], source: str) -> None:
    params = [Param(key, str(value)[:6000]) for key, value in parameters.items()]
    client.log_batch(run_id, params=params, tags=[RunTag("source", source)])


def _dataset(context: str, path: str, digest: str, num_examples: int) -> DatasetInput:
    dataset = Dataset(
        name=Path(path).name,
        digest=digest[:32],
        source_type="local",
        source=json.dumps({"uri": str(path)}),
        profile=json.dumps({"num_examples": num_examples}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
