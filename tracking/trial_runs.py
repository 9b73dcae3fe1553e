"""Owns the child runs of a sweep: each is brought up to its trial's record, in as few requests as possible.

All that a run lacks follows from the record, which has the whole curve, and from what the run has already. So
nothing is logged twice, whatever was lost in between, and a process that ended.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlflow import MlflowClient
from mlflow.entities import Metric, Run, RunTag

from qlora.config import parse_stages
from qlora.failpoints import durable
from tracking.store import PARENT, asking, children, connect, params

STAGES = "stages"  # a trial's epochs as a list: parallel axes take "1+1" and "2" for a text and a number
_SWEEP, _TRIAL, _STATUS, _REASON, _SOURCE = "sweep", "trial_id", "trial_status", "reason", "source"
_RUNNING = "RUNNING"
# What people compare stands in front. MLflow's pages draw the group `system` last, in a tab of its own.
_COMPARED = ("public_perplexity", "training_loss")
_OBJECTIVE, _SCORE = "objective", "score"  # of a point, where trials are not compared by perplexity
_BEHIND = ("epoch", "schedule_percent", "learning_rate", "tokens_per_second", "peak_memory_gib")
_TERMINAL = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "diverged": "FAILED"}
_POINTS_A_REQUEST = 75  # of ten metrics: MLflow takes 1000 a request, and no point is to be cut in two


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
        """Return how the trial stands: pending, running, finished, stopped, failed or diverged."""

    @property
    def curve(self) -> tuple[dict[str, float], ...]:
        """Return one point an evaluation, by ascending step."""

    @property
    def reason(self) -> str:
        """Say why the trial ended before its time."""


@dataclass
class _TrialRun:
    """A child run as the server has it. logged_step: the last one; None where it has to be asked for."""

    run_id: str
    has_params: bool = False
    status: str = _RUNNING
    tags: dict[str, str] = field(default_factory=dict)
    logged_step: float | None = -1.0


class TrialRuns:
    """The child runs of one sweep, by trial. Only one thread may bring them up."""

    def __init__(
        self, experiment_id: str, sweep: str, parent_run_id: str, answered: Callable[[], None] = lambda: None
    ):
        """Know a sweep's parent run; its children are asked for when they are needed.

        `answered` is called whenever the server has answered.
        """
        self._answered = answered
        self._experiment_id, self._sweep, self._parent = experiment_id, sweep, parent_run_id
        self._runs: dict[str, _TrialRun] = {}
        self._are_asked_for = False

    def run_id(self, trial_id: str) -> str | None:
        """Return a trial's run, as far as it is known here."""
        run = self._runs.get(trial_id)
        return run.run_id if run else None

    @asking()
    def bring_up(self, record: TrialRecord, times_ms: Mapping[float, int], now_ms: int) -> None:
        """Create a trial's run if there is none, log what it lacks, and end it if the trial has ended.

        times_ms: when each step's point came in; it is part of a point, so that a repeated request is one.
        """
        client = connect()
        run, ended = self._run(client, record), _TERMINAL.get(record.status)
        told = {_STATUS: record.status, _SOURCE: "ray_jobs/tune.py"}
        if record.reason:
            told[_REASON] = record.reason[:5000]
        changed = {key: value for key, value in told.items() if run.tags.get(key) != value}
        if ended and run.status == ended and not changed:
            return  # ends are logged last
        lacking = self._lacking_points(client, run, record.curve)
        batches = [lacking[i : i + _POINTS_A_REQUEST] for i in range(0, len(lacking), _POINTS_A_REQUEST)]
        if changed or not run.has_params:
            batches = batches or [[]]
        for batch in batches:
            metrics = [m for i in batch for m in _metrics(record.curve[: i + 1], times_ms)]
            with durable("trial logged"):
                client.log_batch(
                    run.run_id,
                    metrics=metrics,
                    params=[] if run.has_params else params(_settings(record)),
                    tags=[RunTag(*tag) for tag in changed.items()] if batch is batches[-1] else [],
                )
            self._answered()
            run.has_params = True
            if batch:
                run.logged_step = record.curve[batch[-1]]["step"]
        run.tags |= changed
        self._set_status(client, run, ended or _RUNNING, now_ms)

    def _set_status(self, client: MlflowClient, run: _TrialRun, status: str, now_ms: int) -> None:
        if run.status == status:
            return
        with durable("run ended" if status != _RUNNING else "run resumed"):
            if status == _RUNNING:
                client.update_run(run.run_id, status=status)
            else:
                client.set_terminated(run.run_id, status, end_time=now_ms)
        run.status = status

    def _run(self, client: MlflowClient, record: TrialRecord) -> _TrialRun:
        if not self._are_asked_for:
            for found in children(client, self._experiment_id, self._parent):
                self._take_in(found)
            self._answered()
            self._are_asked_for = True
        if record.trial_id not in self._runs:
            tags = {_SWEEP: self._sweep, PARENT: self._parent, _TRIAL: record.trial_id}
            name = f"{self._sweep}-{record.trial_id}"
            self._are_asked_for = False  # a request without an answer may have made the run
            with durable("run created"):
                created = client.create_run(self._experiment_id, run_name=name, tags=tags)
            self._answered()
            self._are_asked_for = True
            self._runs[record.trial_id] = _TrialRun(created.info.run_id)
        return self._runs[record.trial_id]

    def _take_in(self, found: Run) -> None:
        """Take in a run that the server has; of two of one trial, the one that was gone on with."""
        trial_id, known = found.data.tags.get(_TRIAL), self._runs
        if trial_id is None or (trial_id in known and (known[trial_id].has_params or not found.data.params)):
            return
        known[trial_id] = _TrialRun(
            found.info.run_id, bool(found.data.params), found.info.status, dict(found.data.tags), None
        )

    def _lacking_points(
        self, client: MlflowClient, run: _TrialRun, curve: Sequence[dict[str, float]]
    ) -> list[int]:
        """Return the places in the curve that are not logged yet."""
        if run.logged_step is None and curve:
            history = client.get_metric_history(run.run_id, _COMPARED[0])
            run.logged_step = max((metric.step for metric in history), default=-1)
        logged = -1 if run.logged_step is None else run.logged_step
        return [i for i, point in enumerate(curve) if point["step"] > logged]


def _settings(record: TrialRecord) -> dict[str, Any]:
    return {**record.config, STAGES: list(parse_stages(record.config["epochs"]))}


def _metrics(curve: Sequence[dict[str, float]], times_ms: Mapping[float, int]) -> list[Metric]:
    """Return what is logged of a curve's last point."""
    newest = curve[-1]
    step, time_ms = int(newest["step"]), times_ms[newest["step"]]
    values = {key: newest[key] for key in (*_COMPARED, _OBJECTIVE) if key in newest}
    reached = [point["public_perplexity"] for point in curve if math.isfinite(point["public_perplexity"])]
    if reached:
        values["best_public_perplexity"] = min(reached)
    judged = [point for point in curve if math.isfinite(point.get(_OBJECTIVE, math.nan))]
    if judged:  # of which scores are, with their signs turned if more is better, the lower the better
        values[f"best_{_OBJECTIVE}"] = min(judged, key=lambda point: point[_SCORE])[_OBJECTIVE]
    values |= {f"system/{key}": newest[key] for key in _BEHIND}
    found = [Metric(key, _finite(value), time_ms, step) for key, value in values.items()]
    epoch = round(newest["epoch"])
    return found + [
        Metric(key, _finite(value), time_ms, epoch) for key, value in _at_epochs_end(curve).items()
    ]


def _finite(value: float) -> float:
    """Return a number that MLflow keeps as it is: of an infinite one it makes the largest that there is."""
    return value if math.isfinite(value) else math.nan


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
