"""Owns training one adapter: data order, schedule by stages, one optimizer step, and the state that resumes it exactly.

A stage is a stretch of epochs with a fresh optimizer and schedule ("1+1+3" has three); the adapter goes on. Everything
random is a function of (seed, epoch) or (seed, step), so a resumed run needs no generator state. Refuses to know Ray, files
and the metric.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora.config import TrialSettings
from qlora.data.prompts import EncodedExample
from qlora.lora.bank import AdapterBank, make_dropout
from qlora.packed.packing import next_pass, split_by_budget
from qlora.passes import run_pass


class DivergedError(RuntimeError):
    """The loss stopped being a finite number."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw: mean NLL over its answer tokens, the learning rate it used, effective tokens, gradient norm
    before clipping."""

    loss: float
    learning_rate: float
    num_tokens: int
    grad_norm: float


@dataclass(frozen=True)
class Timetable:
    """Where steps stand in a trial's schedule. Steps count from 0; `total_steps` optimizer steps make the whole schedule."""

    steps_per_epoch: int
    stages: tuple[int, ...]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return self.steps_per_epoch * sum(self.stages)

    def stage_of(self, step: int) -> tuple[int, int]:
        """(stage, first step of that stage) for the step about to be taken."""
        first = 0
        for stage, epochs in enumerate(self.stages):
            end = first + epochs * self.steps_per_epoch
            if step < end:
                return stage, first
            first = end
        raise ValueError(f"step {step} lies behind the schedule's {self.total_steps}")

    def epochs_at(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step / self.steps_per_epoch

    def percent_at(self, step: int) -> float:
        """Percent of the trial's own schedule done after `step` steps."""
        return 100 * step / self.total_steps


def make_timetable(num_examples: int, settings: TrialSettings) -> Timetable:
    """The timetable of a trial on `num_examples` training examples; an epoch's last batch may be short."""
    return Timetable(math.ceil(num_examples / settings.batch_size), settings.stages)


class Training:
    """One adapter in training on a bank's base, in passes of its own or shared with other trials (`advance_together`). `weights`: see
    AdapterBank.attach."""

    def __init__(
        self,
        bank: AdapterBank,
        examples: Sequence[EncodedExample],
        settings: TrialSettings,
        weights: Tensor | None = None,
    ):
        self.bank, self.examples, self.settings = bank, examples, settings
        self.timetable = make_timetable(len(examples), settings)
        self.adapter = bank.attach(settings, weights)
        self.step = 0
        self._start_stage()

    @property
    def finished(self) -> bool:
        """Whether the whole schedule is done."""
        return self.step >= self.timetable.total_steps

    def advance(self, budget_tokens: int) -> StepResult:
        """Take one optimizer step on the next batch, in passes of at most `budget_tokens`. Raises DivergedError if its loss or gradient
        is not finite."""
        result = advance_together([self], budget_tokens)[0]
        if isinstance(result, StepResult):
            return result
        raise result

    def batch_at(self, step: int) -> list[EncodedExample]:
        """The examples of a step: each epoch is a fresh permutation, a function of seed and epoch."""
        epoch, position = divmod(step, self.timetable.steps_per_epoch)
        generator = torch.Generator().manual_seed(_mix(self.settings.seed, epoch))
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        start = position * self.settings.batch_size
        return [self.examples[index] for index in order[start : start + self.settings.batch_size]]

    def start_step(self) -> list[EncodedExample]:
        """The next batch, with gradients at zero and a new stage's optimizer if one begins."""
        stage, first_step = self.timetable.stage_of(self.step)
        if self.step == first_step and stage > 0:
            self._start_stage()
        self.adapter.gradients.zero_()
        return self.batch_at(self.step)

    def finish_step(self, loss: float, grad_norm: float, num_tokens: int) -> StepResult:
        """Clip, step and count, with the gradients of the whole batch in place. Raises DivergedError."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergedError(
                f"diverged at step {self.step}: loss {loss}, gradient norm {grad_norm}; try a lower learning rate"
            )
        learning_rate = self.schedule.get_last_lr()[0]
        if grad_norm + 1e-6 > self.settings.max_grad_norm:
            self.adapter.gradients.mul_(self.settings.max_grad_norm / (grad_norm + 1e-6))
        self.optimizer.step()
        self.schedule.step()
        self.adapter.refresh()
        self.step += 1
        return StepResult(loss, learning_rate, num_tokens, grad_norm)

    def begin_at(self, step: int) -> None:
        """Take a step that begins a stage for the next one: the stage's optimizer and schedule are fresh, the adapter is as it is."""
        assert self.timetable.stage_of(step)[1] == step, (
            "a stage begins with a fresh optimizer; elsewhere a checkpoint is needed"
        )
        self.step = step
        self._start_stage()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(optimizer tensors, position) of a run between two steps. At the end there are no tensors: no step is left for them."""
        return {} if self.finished else dict(self.optimizer.state[self._parameter]), {
            "step": self.step,
            "settings": self.settings.model_dump(mode="json"),
            "num_examples": len(self.examples),
            "schedule": self.schedule.state_dict(),
        }

    def load_state(self, tensors: dict[str, Tensor], position: dict[str, Any]) -> None:
        """Go on from `state()`; the adapter's weights are loaded elsewhere. Raises ValueError for another run's state."""
        mine = self.settings.model_dump(mode="json"), len(self.examples)
        if (position["settings"], position["num_examples"]) != mine:
            raise ValueError("the checkpoint belongs to a run with other settings or data")
        self.step = position["step"]
        self._start_stage()
        if tensors:
            self.optimizer.state[self._parameter] = {
                key: value.to(self._counts_on(key)) for key, value in tensors.items()
            }
        self.schedule.load_state_dict(position["schedule"])
        for group, learning_rate in zip(
            self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True
        ):
            group["lr"] = learning_rate

    def _counts_on(self, key: str) -> torch.device:
        return torch.device("cpu") if key == "step" and not self._fused else self.bank.device

    def _start_stage(self) -> None:
        # takes seconds to load, which a driver need not wait for
        from transformers import get_scheduler

        stage, _ = self.timetable.stage_of(min(self.step, self.timetable.total_steps - 1))
        steps = self.timetable.stages[stage] * self.timetable.steps_per_epoch
        self._fused = self.bank.device.type == "cuda"
        self._parameter = torch.nn.Parameter(self.adapter.weights)
        self._parameter.grad = self.adapter.gradients
        self.optimizer = torch.optim.AdamW(
            [self._parameter],
            lr=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            fused=self._fused,
        )
        # The state that the first step would make, made now: a step must not run out of memory half done.
        self.optimizer.state[self._parameter] = {
            "step": torch.zeros((), device=self._counts_on("step")),
            "exp_avg": torch.zeros_like(self.adapter.weights),
            "exp_avg_sq": torch.zeros_like(self.adapter.weights),
        }
        self.schedule = get_scheduler(
            self.settings.schedule,
            self.optimizer,
            num_warmup_steps=round(self.settings.warmup_fraction * steps),
            num_training_steps=steps,
        )


def advance_together(trainings: Sequence[Training], budget_tokens: int) -> list[StepResult | Exception]:
    """Take one optimizer step of each of several trials on one bank, in shared passes of at most `budget_tokens`.

    Each trial's result is what it would be alone: its loss is the mean over all answer tokens of its own batch,
    however the passes split it; nothing of it depends on the others. A trial that diverged, or whose optimizer
    failed, has the error in place of a result. Raises, before any trial has stepped, what a shared pass raises.
    """
    batches = [training.start_step() for training in trainings]
    losses = _accumulate_gradients(trainings, batches, budget_tokens)
    norms = [training.adapter.gradients.norm() for training in trainings]
    numbers = torch.stack([*losses, *norms]).tolist()  # one wait for the GPU
    results: list[StepResult | Exception] = []
    for index, (training, batch) in enumerate(zip(trainings, batches, strict=True)):
        loss, grad_norm = numbers[index], numbers[len(trainings) + index]
        try:
            num_tokens = sum(example.num_tokens for example in batch)
            results.append(training.finish_step(loss, grad_norm, num_tokens))
        except Exception as error:  # belongs to this trial: the others' steps are as they should be
            results.append(error.with_traceback(None))
    return results


def _accumulate_gradients(
    trainings: Sequence[Training], batches: Sequence[Sequence[EncodedExample]], budget_tokens: int
) -> list[Tensor]:
    """Run the passes of a step, which add to the adapters' gradients; returns each trial's loss, on the device."""
    bank = trainings[0].bank
    queues = [deque(split_by_budget(batch, budget_tokens)) for batch in batches]
    num_answers = [sum(len(example.answer) for example in batch) for batch in batches]
    losses = [torch.zeros((), device=bank.device) for _ in trainings]
    largest = min(budget_tokens, sum(group.num_tokens for queue in queues for group in queue))
    while any(queues):
        owners, groups = next_pass(queues, budget_tokens)
        there = [trainings[owner] for owner in owners]
        adapters = [training.adapter for training in there]
        dropouts = [
            make_dropout(training.adapter, group, training.step)
            for training, group in zip(there, groups, strict=True)
        ]
        weights = [1 / num_answers[owner] for owner in owners]
        layout, nll_A = run_pass(bank, groups, adapters, dropouts, weights, largest)
        for owner, weight, part_A in zip(owners, weights, nll_A.split(layout.num_answers), strict=True):
            losses[owner] = losses[owner] + weight * part_A.sum()
    return losses


def _mix(seed: int, count: int) -> int:
    """One generator seed for each (seed, count), distinct for counts below 2**32."""
    return (seed << 32 | count) % 2**63
