"""Owns the runs of a sweep in MLflow: one parent a sweep, one child a trial, always brought to a terminal status.

Runs are found again by their tags, so a restored sweep goes on in the same runs. Refuses to know Ray.
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

PROJECT_ROOT = Path(__file__).resolve().parent.parent
_SWEEP, _TRIAL, _PARENT, _STATUS = "sweep", "trial_id", "mlflow.parentRunId", "trial_status"
_TERMINAL = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}


class TrialRecord(Protocol):
    """What is read of a trial's record."""

    @property
    def trial_id(self) -> str: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def status(self) -> str: ...
    @property
    def curve(self) -> tuple[dict[str, float], ...]: ...
    @property
    def best(self) -> dict[str, float] | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def reason(self) -> str: ...


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI, else the SQLite store under the project's mlruns/."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{PROJECT_ROOT / 'mlruns' / 'mlflow.db'}"


def connect() -> MlflowClient:
    """A client of the tracking server, whose schema is created or migrated on first use."""
    uri = tracking_uri()
    (PROJECT_ROOT / "mlruns").mkdir(exist_ok=True)
    mlflow.set_tracking_uri(uri)  # for what MLflow calls in itself
    return MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)


def ensure_experiment(client: MlflowClient, name: str) -> str:
    """The id of the experiment, created if need be. A local store keeps artifacts under mlruns/artifacts."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    local = tracking_uri().startswith("sqlite:")
    return client.create_experiment(
        name, artifact_location=(PROJECT_ROOT / "mlruns" / "artifacts").as_uri() if local else None
    )


@dataclass
class SweepTracker:
    """Follows a sweep's trials into MLflow. Holds plain data only, so Ray can store it with the sweep.

    A child's metrics are drawn over optimizer steps; those whose name begins with `epoch_` over whole epochs, the training loss
    being the mean of the epoch's.
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
            values = {key: value for key, value in newest.items() if key != "step"}
            if record.best is not None:
                values["best_public_perplexity"] = record.best["public_perplexity"]
            now_ms = time.time_ns() // 1_000_000
            metrics = [Metric(key, value, now_ms, int(newest["step"])) for key, value in values.items()]
            metrics += [
                Metric(key, value, now_ms, round(newest["epoch"]))
                for key, value in _at_epochs_end(record.curve).items()
            ]
            client.log_batch(run_id, metrics=metrics)
        client.set_tag(run_id, _STATUS, record.status)
        if record.reason:
            client.set_tag(run_id, "reason", record.reason[:5000])
        if record.status in _TERMINAL:
            client.set_terminated(run_id, _TERMINAL[record.status])
        else:
            client.update_run(run_id, status="RUNNING")

    def run_id(self, record: TrialRecord) -> str:
        """The child run of a trial, created with its parameters if there is none yet."""
        if record.trial_id not in self.run_ids:
            client = connect()
            found = _find_run(client, self.experiment_id, {_SWEEP: self.sweep, _TRIAL: record.trial_id})
            if found is None:
                tags = {_SWEEP: self.sweep, _TRIAL: record.trial_id, _PARENT: self.parent_run_id}
                found = client.create_run(
                    self.experiment_id, run_name=f"{self.sweep}-{record.trial_id}", tags=tags
                )
                _log_params(client, found.info.run_id, record.config)
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
        """Tags and files of the sweep, and tags of trials by their ids."""
        client = connect()
        tags = [RunTag(key, str(value)[:5000]) for key, value in facts.items() if value is not None]
        client.log_batch(self.parent_run_id, tags=tags)
        for file in files:
            client.log_artifact(self.parent_run_id, str(file))
        for trial_id, more in (trial_tags or {}).items():
            client.log_batch(self.run_ids[trial_id], tags=[RunTag(key, value) for key, value in more.items()])

    @contextmanager
    def system_metrics(self) -> Iterator[None]:
        """Within: this machine's load, memory and GPUs are drawn on the parent run, every ten seconds."""
        monitor = SystemMetricsMonitor(self.parent_run_id, resume_logging=True, tracking_uri=tracking_uri())
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    def end(self, status: str, metrics: Mapping[str, float]) -> None:
        """End the parent run with FINISHED, FAILED or KILLED, and every child that was left running with KILLED."""
        client = connect()
        for key, value in metrics.items():
            client.log_metric(self.parent_run_id, key, value)
        left_running = f"tags.`{_PARENT}` = '{self.parent_run_id}' and attributes.status = 'RUNNING'"
        for child in client.search_runs([self.experiment_id], left_running):
            client.set_terminated(child.info.run_id, "KILLED")
        client.set_terminated(self.parent_run_id, status)


def start_sweep(
    sweep: str, experiment: str, parameters: Mapping[str, Any], data: Mapping[str, tuple[str, str, int]]
) -> SweepTracker:
    """A tracker with its parent run: the one that this sweep already has, else a new one.

    `data` maps a context (train, public) to (path, digest, number of examples).
    """
    client = connect()
    experiment_id = ensure_experiment(client, experiment)
    parent = _find_run(client, experiment_id, {_SWEEP: sweep, "kind": "sweep"})
    if parent is None:
        parent = client.create_run(experiment_id, run_name=sweep, tags={_SWEEP: sweep, "kind": "sweep"})
        _log_params(client, parent.info.run_id, parameters)
        client.log_inputs(parent.info.run_id, [_dataset(context, *facts) for context, facts in data.items()])
    client.update_run(parent.info.run_id, status="RUNNING")
    return SweepTracker(experiment_id, sweep, parent.info.run_id)


def note_study(
    experiment: str, study: str, runs: Mapping[str, tuple[Mapping[str, Any], Mapping[str, float]]], page: Path
) -> str:
    """A parent run of a study with its page, and a finished child a result: (parameters, metrics) by name; found again if it is there
    already. Returns the parent's id."""
    client = connect()
    experiment_id = ensure_experiment(client, experiment)
    parent = _find_run(client, experiment_id, {"study": study, "kind": "study"}) or client.create_run(
        experiment_id, run_name=study, tags={"study": study, "kind": "study"}
    )
    for name, (parameters, metrics) in runs.items():
        tags = {"study": study, "result": name, _PARENT: parent.info.run_id}
        if _find_run(client, experiment_id, {"study": study, "result": name}) is None:
            child = client.create_run(experiment_id, run_name=f"{study}: {name}", tags=tags)
            _log_params(client, child.info.run_id, parameters)
            for key, value in metrics.items():
                client.log_metric(child.info.run_id, key, value)
            client.set_terminated(child.info.run_id, "FINISHED")
    client.log_artifact(parent.info.run_id, str(page))
    client.set_terminated(parent.info.run_id, "FINISHED")
    return parent.info.run_id  # type: ignore[no-any-return]


def _at_epochs_end(curve: Sequence[dict[str, float]]) -> dict[str, float]:
    """What is drawn over epochs, if the newest point is at the end of one."""
    newest = curve[-1]
    if abs(newest["epoch"] - round(newest["epoch"])) > 1e-9:
        return {}
    before = [0.0, *(point["step"] for point in curve)]
    lengths = [
        (point, point["step"] - start)
        for start, point in zip(before, curve, strict=False)
        if point["epoch"] > newest["epoch"] - 1
    ]
    loss = sum(point["training_loss"] * steps for point, steps in lengths) / sum(
        steps for _, steps in lengths
    )
    return {"epoch_public_perplexity": newest["public_perplexity"], "epoch_training_loss": loss}


def _find_run(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> Run | None:
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_runs([experiment_id], query, max_results=1)
    return found[0] if found else None


def _log_params(client: MlflowClient, run_id: str, parameters: Mapping[str, Any]) -> None:
    client.log_batch(
        run_id,
        params=[Param(key, str(value)[:6000]) for key, value in parameters.items()],
        tags=[RunTag("source", "ray_jobs/tune.py")],
    )


def _dataset(context: str, path: str, digest: str, num_examples: int) -> DatasetInput:
    dataset = Dataset(
        name=Path(path).name,
        digest=digest[:32],
        source_type="local",
        source=json.dumps({"uri": str(path)}),
        profile=json.dumps({"num_examples": num_examples}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
