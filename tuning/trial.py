"""Owns one trial: an ordinary Ray Tune function trainable that trains an adapter and reports at rungs and ends of epochs."""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from qlora.base_model import default_token_budget
from qlora.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, verify_checkpoint
from qlora.perplexity import example_perplexities, mean_perplexity
from qlora.prompts import EncodedExample
from qlora.training import StepResult, Timetable, Training
from tuning.host import lent_base, resident_base
from tuning.space import Space


@dataclass(frozen=True)
class SweepData:
    """What every trial of a sweep works on, sent to the workers once."""

    space: Space
    train: list[EncodedExample]
    public: list[EncodedExample]


def run_trial(config: dict[str, Any], data: SweepData) -> None:
    """Train one configuration from where its last whole checkpoint is, reporting perplexity with a checkpoint each time."""
    _use_own_cores()
    settings = data.space.trial_settings(config)
    budget = data.space.budget_tokens or default_token_budget()
    with lent_base(data.space.base_model, settings) as model:
        training = Training(model, data.train, settings, budget)
        _resume(training)
        stops = evaluation_steps(training.timetable, data.space.scheduler, settings.evaluations_per_epoch)
        seen: list[StepResult] = []
        started = time.monotonic()
        while not training.finished:
            seen.append(training.advance())
            if training.step in stops:
                training_seconds = time.monotonic() - started
                perplexity = mean_perplexity(example_perplexities(model, data.public, budget))
                _report(training, _metrics(training, seen, training_seconds, perplexity))
                seen, started = [], time.monotonic()


def measure_zero_shot(data: SweepData) -> list[float]:
    """Perplexity of each public example under the base without an adapter."""
    _use_own_cores()
    return example_perplexities(resident_base(data.space.base_model), data.public, data.space.budget_tokens or default_token_budget())


def evaluation_steps(timetable: Timetable, scheduler: Any, evaluations_per_epoch: int) -> set[int]:
    """Steps after which a trial is evaluated: the scheduler's rungs, and equal parts of every epoch up to its end."""
    epochs = sum(timetable.stages)
    parts = {math.ceil(part * timetable.steps_per_epoch / evaluations_per_epoch) for part in range(1, evaluations_per_epoch + 1)}
    steps = {epoch * timetable.steps_per_epoch + part for epoch in range(epochs) for part in parts}
    if scheduler.type == "asha":
        scale = Fraction(timetable.total_steps, 100 if scheduler.time_attr == "schedule_percent" else timetable.total_steps)
        steps |= {math.ceil(Fraction(rung) * scale) for rung in (*scheduler.rungs, scheduler.max_t)}
    return {step for step in steps if 1 <= step <= timetable.total_steps}


def _use_own_cores() -> None:
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, int(cpus)))


def _metrics(training: Training, seen: Sequence[StepResult], training_seconds: float, perplexity: float) -> dict[str, float]:
    on_gpu = training.device.type == "cuda"
    return {
        "public_perplexity": perplexity,
        "training_loss": sum(result.loss for result in seen) / len(seen),
        "learning_rate": seen[-1].learning_rate,
        "step": training.step,
        "epoch": training.timetable.epochs_at(training.step),
        "schedule_percent": training.timetable.percent_at(training.step),
        "tokens_per_second": sum(result.num_tokens for result in seen) / training_seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
    }


def _report(training: Training, metrics: dict[str, float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), training)
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def _resume(training: Training) -> None:
    """Load the trial's newest whole checkpoint, if it has any; a damaged one is passed over for the one before it."""
    newest = tune.get_checkpoint()
    if newest is None:
        return
    with newest.as_directory() as folder:
        siblings = sorted(Path(newest.path).parent.glob("checkpoint_*"), reverse=True)
        for candidate in [Path(folder), *siblings]:
            try:
                verify_checkpoint(candidate)
            except CheckpointError as error:
                print(f"passing over a damaged checkpoint: {error}")
                continue
            load_checkpoint(candidate, training)
            return
