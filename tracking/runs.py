"""Owns the runs of sweeps and studies in MLflow: one parent each, one child a trial or result.

Runs are found again by an id of the sweep's own, so that a restored sweep goes on in the same runs, and one
that is run again under an old name never does. What an ended process left out of a run is logged by the next.
Refuses to know Ray.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Run

from qlora.failpoints import durable
from tracking.endings import killed_if_left
from tracking.store import PARENT, asking, children, connect, ensure_experiment, find_run, params
from tracking.sweep_tracker import SweepTracker

_SWEEP, _SWEEP_ID, _SOURCE = "sweep", "sweep_id", "source"


@asking()
def start_sweep(sweep: str, sweep_id: str | None, experiment: str) -> SweepTracker:
    """Return a tracker with its parent run: the one that this sweep already has, else a new one.

    `sweep_id`: of this very sweep; None for one from before sweeps had ids, which is found by its name.
    """
    client = connect()
    experiment_id = ensure_experiment(client, experiment)
    known = {_SWEEP_ID: sweep_id} if sweep_id else {_SWEEP: sweep}
    mine = {**known, "kind": "sweep"}
    with killed_if_left(experiment_id, mine):
        parent = find_run(client, experiment_id, mine)
        if parent is None:
            tags = {**mine, _SWEEP: sweep, _SOURCE: "ray_jobs/tune.py"}
            with durable("run created"):
                parent = client.create_run(experiment_id, run_name=sweep, tags=tags)
        run_id = parent.info.run_id
        if parent.info.status != "RUNNING":
            with durable("run resumed"):
                client.update_run(run_id, status="RUNNING")
        return SweepTracker(experiment_id, sweep, run_id, parent.info.start_time)


@asking()
def describe_sweep(
    tracker: SweepTracker, parameters: Mapping[str, Any], data: Mapping[str, tuple[str, str, int]]
) -> None:
    """Log what a sweep works on with its parent run, unless that is there.

    `data` maps a context (train, public) to (path, digest, number of examples).
    """
    client = connect()
    parent = client.get_run(tracker.parent_run_id)
    if not parent.data.params:
        with durable("sweep noted"):
            client.log_batch(tracker.parent_run_id, params=params(parameters))
    if not (parent.inputs and parent.inputs.dataset_inputs):
        with durable("sweep noted"):
            inputs = [_dataset(context, *facts) for context, facts in data.items()]
            client.log_inputs(tracker.parent_run_id, inputs)


@asking()
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
    mine = {**known, "kind": "study"}
    with killed_if_left(experiment_id, mine):
        parent = find_run(client, experiment_id, mine)
        if parent is None:
            tags = {**mine, "study": study}
            with durable("run created"):
                parent = client.create_run(experiment_id, run_name=study, tags=tags)
        parent_id = parent.info.run_id
        there = {run.data.tags.get("result"): run for run in children(client, experiment_id, parent_id)}
        for name, (parameters, metrics) in runs.items():
            child = there.get(name)
            if child is None:
                tags = {"study": study, PARENT: parent_id, "result": name, _SOURCE: "ray_jobs/study.py"}
                with durable("run created"):
                    child = client.create_run(experiment_id, run_name=f"{study}: {name}", tags=tags)
            if child.info.status != "FINISHED":
                _note_result(client, child, parameters, metrics)
        with durable("artifacts logged"):
            client.log_artifact(parent_id, str(page))
        with durable("run ended"):
            client.set_terminated(parent_id, "FINISHED")
        return experiment_id, parent_id


def _note_result(
    client: MlflowClient, run: Run, parameters: Mapping[str, Any], metrics: Mapping[str, float]
) -> None:
    """Log what a run lacks of a result, and end it."""
    now_ms, known = time.time_ns() // 1_000_000, run.data.metrics
    values = [Metric(key, value, now_ms, 0) for key, value in metrics.items() if key not in known]
    with durable("result logged"):
        client.log_batch(run.info.run_id, metrics=values, params=params(parameters))
    with durable("run ended"):
        client.set_terminated(run.info.run_id, "FINISHED")


def _dataset(context: str, path: str, digest: str, num_examples: int) -> DatasetInput:
    dataset = Dataset(
        name=Path(path).name,
        digest=digest[:32],
        source_type="local",
        source=json.dumps({"uri": str(path)}),
        profile=json.dumps({"num_examples": num_examples}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
