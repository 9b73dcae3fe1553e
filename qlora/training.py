"""Owns training an adapter: data order, stages, optimizer steps, and the state that resumes it exactly.

The optimizer is AdamW (https://arxiv.org/abs/1711.05101) over the adapter's weights as one vector, with
gradients clipped by their norm. A stage is a stretch of epochs with a fresh optimizer and schedule ("1+1+3"
has three); the adapter's weights go on. Several trials take their steps together, in shared passes.

Everything random is a function of (seed, epoch) or (seed, step), so that a resumed run needs no generator
state.

Refuses to know Ray, files and the metric.
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
    """A loss or gradient that is not a finite number."""


@dataclass(frozen=True)
class StepResult:
    """The numbers of one optimizer step.

    loss: mean NLL in nats over the batch's answer tokens. learning_rate: the one that the step used.
    num_tokens: prompt and answer tokens of the batch's examples. grad_norm: norm of the gradient before
    clipping.
    """

    loss: float
    learning_rate: float
    num_tokens: int
    grad_norm: float


@dataclass(frozen=True)
class Timetable:
    """A trial's schedule in steps, which are counted from 0."""

    steps_per_epoch: int
    stages: tuple[int, ...]

    @property
    def total_steps(self) -> int:
        """Count the optimizer steps of all stages."""
        return self.steps_per_epoch * sum(self.stages)

    def stage_of(self, step: int) -> tuple[int, int]:
        """Return the stage that a step belongs to, and that stage's first step.

        Raises ValueError for a step behind the schedule's last.
        """
        first = 0
        for stage, epochs in enumerate(self.stages):
            end = first + epochs * self.steps_per_epoch
            if step < end:
                return stage, first
            first = end
        raise ValueError(f"step {step} lies behind the schedule's {self.total_steps}")

    def epochs_at(self, step: int) -> float:
        """Return how many epochs are done after `step` steps."""
        return step / self.steps_per_epoch

    def percent_at(self, step: int) -> float:
        """Return what percentage of the trial's own schedule is done after `step` steps."""
        return 100 * step / self.total_steps


def make_timetable(num_examples: int, settings: TrialSettings) -> Timetable:
    """Make the timetable of a trial on so many training examples; an epoch's last batch may be short."""
    return Timetable(math.ceil(num_examples / settings.batch_size), settings.stages)


class Training:
    """One adapter in training on a bank's base.

    It advances in passes of its own (`advance`), or in passes shared with other trials (`advance_together`).
    """

    def __init__(
        self,
        bank: AdapterBank,
        examples: Sequence[EncodedExample],
        settings: TrialSettings,
        weights: Tensor | None = None,
    ):
        """Attach a new adapter to the bank; `weights` are its initial ones, if they are drawn already."""
        self.bank = bank
        self.examples = examples
        self.settings = settings
        self.timetable = make_timetable(len(examples), settings)
        self.adapter = bank.attach(settings, weights)
        self.step = 0
        self._fused = bank.device.type == "cuda"
        # What AdamW's first step would make is made now: a step must not run out of memory half done.
        self._state = {
            "step": torch.zeros((), device=bank.device if self._fused else "cpu"),  # where AdamW counts
            "exp_avg": torch.zeros_like(self.adapter.weights),
            "exp_avg_sq": torch.zeros_like(self.adapter.weights),
        }
        self._start_stage()

    @property
    def finished(self) -> bool:
        """Tell whether the whole schedule is done."""
        return self.step >= self.timetable.total_steps

    def advance(self, budget_tokens: int) -> StepResult:
        """Take one optimizer step on the next batch, in passes of at most `budget_tokens`.

        Raises DivergedError if its loss or gradient is not finite.
        """
        result = advance_together([self], budget_tokens)[0]
        if isinstance(result, StepResult):
            return result
        raise result

    def batch_at(self, step: int) -> list[EncodedExample]:
        """Return the examples of a step. Each epoch is a fresh permutation, a function of seed and epoch."""
        epoch, position = divmod(step, self.timetable.steps_per_epoch)
        generator = torch.Generator().manual_seed(_mix(self.settings.seed, epoch))
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        start = position * self.settings.batch_size
        return [self.examples[index] for index in order[start : start + self.settings.batch_size]]

    def start_step(self) -> list[EncodedExample]:
        """Return the next batch; set gradients to zero and, if a new stage begins, make its optimizer."""
        stage, first_step = self.timetable.stage_of(self.step)
        if self.step == first_step and stage > 0:
            self._start_stage()
        self.adapter.gradients.zero_()
        return self.batch_at(self.step)

    def finish_step(self, loss: float, grad_norm: float, num_tokens: int) -> StepResult:
        """Clip the gradients of the whole batch, which are in place, take the step and count it.

        Raises DivergedError if loss or gradient is not finite; then nothing has changed.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergedError(
                f"diverged at step {self.step}: loss {loss}, gradient norm {grad_norm}; "
                "try a lower learning rate"
            )
        learning_rate = self.schedule.get_last_lr()[0]
        if grad_norm + 1e-6 > self.settings.max_grad_norm:
            self.adapter.gradients.mul_(self.settings.max_grad_norm / (grad_norm + 1e-6))
        self.optimizer.step()
        self.schedule.step()
        self.adapter.refresh()
        self.step += 1
        return StepResult(loss=loss, learning_rate=learning_rate, num_tokens=num_tokens, grad_norm=grad_norm)

    def begin_at(self, step: int) -> None:
        """Go to a step that begins a stage, with a fresh optimizer and schedule and the adapter as it is."""
        assert self.timetable.stage_of(step)[1] == step, (
            "a stage begins with a fresh optimizer; elsewhere a checkpoint is needed"
        )
        self.step = step
        self._start_stage()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state of a run between two steps: the optimizer's tensors, and its position.

        At the end there are no tensors, since no step is left to use them.
        """
        tensors = {} if self.finished else dict(self._state)
        position = {
            "step": self.step,
            "settings": self.settings.model_dump(mode="json"),
            "num_examples": len(self.examples),
            "schedule": self.schedule.state_dict(),
        }
        return tensors, position

    def load_state(self, tensors: dict[str, Tensor], position: dict[str, Any]) -> None:
        """Restore what `state` returned; the adapter's weights are loaded elsewhere.

        Raises ValueError for the state of a run with other settings or data.
        """
        has_same_settings = position["settings"] == self.settings.model_dump(mode="json")
        has_same_data = position["num_examples"] == len(self.examples)
        if not (has_same_settings and has_same_data):
            raise ValueError("the checkpoint belongs to a run with other settings or data")
        self.step = position["step"]
        self._start_stage()
        for key, value in tensors.items():
            self._state[key].copy_(value)
        self.schedule.load_state_dict(position["schedule"])
        learning_rates = self.schedule.get_last_lr()
        for group, learning_rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = learning_rate

    def _start_stage(self) -> None:
        """Make the optimizer and the schedule of the stage that the step is in.

        AdamW's state is set to zero in place: beside that of the stage before, it would take memory twice.
        """
        from transformers import get_scheduler  # takes seconds to load, which a driver need not wait for

        stage, _ = self.timetable.stage_of(min(self.step, self.timetable.total_steps - 1))
        steps = self.timetable.stages[stage] * self.timetable.steps_per_epoch
        self._parameter = torch.nn.Parameter(self.adapter.weights)
        self._parameter.grad = self.adapter.gradients
        self.optimizer = torch.optim.AdamW(
            [self._parameter],
            lr=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            fused=self._fused,
        )
        for value in self._state.values():
            value.zero_()
        self.optimizer.state[self._parameter] = self._state
        self.schedule = get_scheduler(
            self.settings.schedule,
            self.optimizer,
            num_warmup_steps=round(self.settings.warmup_fraction * steps),
            num_training_steps=steps,
        )


def advance_together(trainings: Sequence[Training], budget_tokens: int) -> list[StepResult | Exception]:
    """Take one optimizer step of each of several trials on one bank, in shared passes.

    A pass has at most `budget_tokens`. Each trial's result is what it would be alone: its loss is the mean
    over all answer tokens of its own batch, however passes split it, and nothing of it depends on the other
    trials. A trial that diverged, or whose optimizer failed, has the error in place of a result. What a
    shared pass raises is raised before any trial has stepped.
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
        except Exception as error:  # it is this trial's alone: the others' steps are as they should be
            results.append(error.with_traceback(None))
    return results


def _accumulate_gradients(
    trainings: Sequence[Training], batches: Sequence[Sequence[EncodedExample]], budget_tokens: int
) -> list[Tensor]:
    """Run the passes of a step, which add to adapters' gradients; return each trial's loss, on the device."""
    bank = trainings[0].bank
    queues = [deque(split_by_budget(batch, budget_tokens)) for batch in batches]
    num_answers = [sum(example.num_scored for example in batch) for batch in batches]
    losses = [torch.zeros((), device=bank.device) for _ in trainings]
    num_tokens = sum(group.num_tokens for queue in queues for group in queue)
    largest = min(budget_tokens, num_tokens)
    while any(queues):
        owners, groups = next_pass(queues, budget_tokens)
        adapters = []
        dropouts = []
        for owner, group in zip(owners, groups, strict=True):
            training = trainings[owner]
            adapters.append(training.adapter)
            dropouts.append(make_dropout(training.adapter, group, training.step))
        weights = [1 / num_answers[owner] for owner in owners]
        layout, nll_A = run_pass(bank, groups, adapters, dropouts, weights, largest)
        for owner, weight, part_A in zip(owners, weights, nll_A.split(layout.num_answers), strict=True):
            losses[owner] = losses[owner] + weight * part_A.sum()
    return losses


def _mix(seed: int, count: int) -> int:
    """Combine a seed and a count to one seed of a generator, distinct for counts below 2**32."""
    return (seed << 32 | count) % 2**63
