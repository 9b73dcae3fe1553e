"""Owns training one adapter: data order, schedule by stages, one optimizer step, and the state that resumes it exactly.

A stage is a stretch of epochs with a fresh optimizer and schedule ("1+1+3" has three); the adapter goes on. Everything
random is a function of (seed, epoch) or (seed, step), so a resumed run needs no generator state. Refuses to know Ray, files
and the metric.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from qlora.config import TrialSettings
from qlora.packing import pack, split_by_budget
from qlora.perplexity import answer_nll
from qlora.prompts import EncodedExample


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
    """One adapter in training. `model` is a PEFT model with packed attention; only its LoRA weights need gradients."""

    def __init__(self, model: Any, examples: Sequence[EncodedExample], settings: TrialSettings, budget_tokens: int):
        self.model, self.examples, self.settings, self.budget_tokens = model, examples, settings, budget_tokens
        self.timetable = make_timetable(len(examples), settings)
        self.parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        self.step = 0
        self._start_stage()

    @property
    def finished(self) -> bool:
        """Whether the whole schedule is done."""
        return self.step >= self.timetable.total_steps

    def advance(self) -> StepResult:
        """Take one optimizer step on the next batch. Raises DivergedError if its loss or gradient is not finite."""
        stage, first_step = self.timetable.stage_of(self.step)
        if self.step == first_step and stage > 0:
            self._start_stage()
        batch = self.batch_at(self.step)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(_mix(self.settings.seed, self.step))
            loss = self._accumulate_gradients(batch)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(f"diverged at step {self.step}: loss {loss}, gradient norm {norm}; try a lower learning rate")
        learning_rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return StepResult(loss, learning_rate, sum(example.num_tokens for example in batch), norm)

    def batch_at(self, step: int) -> list[EncodedExample]:
        """The examples of a step: each epoch is a fresh permutation, a function of seed and epoch."""
        epoch, position = divmod(step, self.timetable.steps_per_epoch)
        generator = torch.Generator().manual_seed(_mix(self.settings.seed, epoch))
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        start = position * self.settings.batch_size
        return [self.examples[index] for index in order[start:start + self.settings.batch_size]]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(optimizer tensors named PARAMETER/KEY, position) of a run between two steps."""
        tensors = {f"{name}/{key}": value for name, parameter in self.parameters.items()
                   for key, value in self.optimizer.state.get(parameter, {}).items()}
        return tensors, {"step": self.step, "settings": self.settings.model_dump(mode="json"), "num_examples": len(self.examples),
                         "schedule": self.schedule.state_dict()}

    def load_state(self, tensors: dict[str, Tensor], position: dict[str, Any]) -> None:
        """Go on from `state()`; the adapter's weights are loaded elsewhere. Raises ValueError for another run's state."""
        if position["settings"] != self.settings.model_dump(mode="json") or position["num_examples"] != len(self.examples):
            raise ValueError("the checkpoint belongs to a run with other settings or data")
        self.step = position["step"]
        self._start_stage()
        for name, parameter in self.parameters.items():
            found = {key.rpartition("/")[2]: value for key, value in tensors.items() if key.rpartition("/")[0] == name}
            if found:
                step = found.pop("step").cpu()
                self.optimizer.state[parameter] = {"step": step, **{key: value.to(parameter.device) for key, value in found.items()}}
        self.schedule.load_state_dict(position["schedule"])
        for group, learning_rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = learning_rate

    def _accumulate_gradients(self, batch: list[EncodedExample]) -> float:
        """The loss is the mean over all answer tokens of the step, however the budget splits it."""
        self.model.train()
        num_answer_tokens = sum(len(example.answer) for example in batch)
        total = torch.zeros((), device=self.device)
        for group in split_by_budget(batch, self.budget_tokens):
            packed = pack([batch[index] for index in group], self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = answer_nll(self.model, packed).sum() / num_answer_tokens
            loss.backward()
            total += loss.detach()
        return total.item()

    def _start_stage(self) -> None:
        stage, _ = self.timetable.stage_of(min(self.step, self.timetable.total_steps - 1))
        steps = self.timetable.stages[stage] * self.timetable.steps_per_epoch
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=self.settings.learning_rate,
                                           weight_decay=self.settings.weight_decay)
        self.schedule = get_scheduler(self.settings.schedule, self.optimizer,
                                      num_warmup_steps=round(self.settings.warmup_fraction * steps), num_training_steps=steps)


def _mix(seed: int, count: int) -> int:
    """One generator seed for each (seed, count), distinct for counts below 2**32."""
    return (seed << 32 | count) % 2**63
