"""Owns the plan: what a sweep is about to need, in numbers, before anything starts.

Memory is counted by tuning.plan_memory, time is estimated by tuning.plan_time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora.base.device import CPU_PASS_TOKENS
from qlora.config import InputError
from qlora.data.prompts import EncodedExample
from qlora.lora.products import MAX_GPU_RANK
from qlora.lora.targets import unknown_targets
from tuning.device import Device
from tuning.model_size import ModelSize
from tuning.plan_memory import ADAPTER_BYTES, TextsMemory, TrainingMemory, gib
from tuning.plan_time import expected_seconds
from tuning.space import Space

_CHECKPOINT_BYTES = 12  # a parameter: weight and two moments
_CHECKPOINTS = 2  # of a trial on disk
_SLACK = 1.1  # of activations, where room is looked for: what an allocator can't use
_USABLE = 0.9  # of free memory
GPU_PASS_TOKENS = 24576  # more of them make no kernel faster
_MOST_TRIALS = 8  # of a device, unless told: more of them gain little once passes are full


@dataclass(frozen=True)
class Plan:
    """The needs of a sweep on each of its devices, in bytes and seconds.

    trials: side by side on a device. adapter_bytes: of a trial with what training needs beside its adapter,
    at most; mean_adapter_bytes: of one with middling settings. fullest_adapters_bytes: of all that are side
    by side, when they take most. text_bytes: of trials' texts, if the objective is of such. recomputes:
    layers are computed again in the backward, since memory is too short for what they would keep
    (qlora.base.recomputed).
    """

    base_bytes: int
    adapter_bytes: int
    mean_adapter_bytes: int
    fullest_adapters_bytes: int
    activation_bytes: int
    budget_tokens: int
    trials: int
    disk_bytes: int
    num_devices: int
    seconds: float
    seconds_without_stopping: float
    recomputes: bool = False
    text_bytes: int = 0

    @property
    def most_bytes(self) -> int:
        """Return a device's memory with all of its trials, each the largest that the space allows."""
        return self.base_bytes + self.trials * self.adapter_bytes + self._work_bytes

    @property
    def peak_bytes(self) -> int:
        """Return the memory to be expected at a sweep's fullest moment."""
        return self.base_bytes + self.fullest_adapters_bytes + self._work_bytes

    @property
    def _work_bytes(self) -> int:
        """Return what the work takes that is under way: a pass of training, or texts."""
        return max(self.activation_bytes, self.text_bytes)


def make_plan(
    space: Space,
    train: Sequence[EncodedExample],
    public: Sequence[EncodedExample],
    size: ModelSize,
    device: Device,
    num_devices: int = 1,
    num_others: int = 0,
    texts: TextsMemory | None = None,
) -> Plan:
    """Plan a sweep on one or several such devices, with `num_others` of other kinds beside them.

    `texts`: counts those of trials, if they write some.

    Raises InputError, naming what to change, for target modules that the base lacks, and if the trials don't
    fit.
    """
    _check_settings(space, size, device)
    asked = _asked_side_by_side(space, device)
    memory = _memory_of(TrainingMemory(space, train, size, device), asked)
    num_here = -(-space.num_trials // (num_devices + num_others))  # trials of each device, so that none idles
    most = min(_MOST_TRIALS, num_here)
    trials = asked or _fitting(memory, most)
    largest = memory.largest_pass(trials)
    most_tokens = min(largest, GPU_PASS_TOKENS if device.kind == "cuda" else CPU_PASS_TOKENS)
    token_bytes = _SLACK * memory.of_pass(most_tokens) / most_tokens
    room = int((_USABLE * memory.free - memory.base - trials * memory.adapter) / token_bytes)
    budget = space.budget_tokens or max(min(room, most_tokens), memory.longest_example)
    seconds, unstopped = expected_seconds(
        space,
        train,
        public,
        size,
        device,
        step_tokens=memory.step_tokens,
        side_by_side=trials,
        num_devices=num_devices,
        pass_tokens=budget,
        num_weights=memory.mean_weights,
        keeps_nf4=memory.keeps_nf4,
        recomputes=memory.recomputes,
    )
    activations = int(memory.of_pass(min(budget, largest)))
    return Plan(
        base_bytes=memory.base,
        adapter_bytes=memory.adapter,
        mean_adapter_bytes=int(memory.mean_adapter),
        fullest_adapters_bytes=memory.fullest_adapters(trials, max(trials, num_here)),
        activation_bytes=activations,
        budget_tokens=budget,
        trials=trials,
        disk_bytes=_CHECKPOINTS * space.num_trials * memory.adapter * _CHECKPOINT_BYTES // ADAPTER_BYTES,
        num_devices=num_devices,
        seconds=seconds,
        seconds_without_stopping=unstopped,
        recomputes=memory.recomputes,
        text_bytes=memory.of_texts(texts, trials, activations),
    )


def _check_settings(space: Space, size: ModelSize, device: Device) -> None:
    for wanted in space.values("target_modules"):
        targets = space.trial_settings({"target_modules": wanted}).target_modules
        if unknown := unknown_targets(targets, list(size.layers)):
            raise InputError("target_modules", unknown)
    rank = max(space.values("lora_r"))
    if device.kind == "cuda" and rank > MAX_GPU_RANK:
        raise InputError("lora_r", f"{rank:g} is more than the {MAX_GPU_RANK} that a GPU takes")


def _asked_side_by_side(space: Space, device: Device) -> int | None:
    """Return the trials that share a device as the space has it; None if it leaves that to the plan."""
    if space.trials_per_gpu == "auto":
        return None
    if space.trials_per_gpu is not None:
        trials = space.trials_per_gpu
    elif space.resources_per_trial.gpu:
        trials = int(1 / space.resources_per_trial.gpu + 1e-3)
    else:
        trials = int(device.num_cpus / max(space.resources_per_trial.cpu, 1e-3))
    return max(1, min(trials, space.num_trials, space.max_concurrent_trials or trials))


def _memory_of(memory: TrainingMemory, asked: int | None) -> TrainingMemory:
    """Return the memory of trials that keep what layers give, or of those that don't if that is too much.

    `asked`: trials side by side, if the space says how many. Raises InputError if not even these fit.
    """
    for recomputes in (False, True) if memory.size.can_recompute else (False,):
        memory = replace(memory, recomputes=recomputes)
        least = memory.base + memory.adapter + int(memory.of_pass(memory.longest_example))
        needed = least + ((asked or 1) - 1) * memory.adapter
        if needed <= memory.free:
            return memory
    if least > memory.free:
        raise InputError(
            "base_model",
            f"a trial needs {gib(least)} on a device (base {gib(memory.base)}, adapter and optimizer "
            f"{gib(memory.adapter)}), but {gib(memory.free)} are free; choose a smaller base or lora_r, or a "
            "larger device",
        )
    raise InputError(
        "trials_per_gpu",
        f"{asked} trials need {gib(needed)} on a device, but {gib(memory.free)} are free; lower it, "
        "or set it to auto",
    )


def _fitting(memory: TrainingMemory, most: int) -> int:
    """Return how many trials fit with a pass of two of their steps, at most so many."""
    for count in range(most, 1, -1):
        passes = _SLACK * memory.of_pass(min(count, 2) * memory.step_tokens)
        if memory.base + count * memory.adapter + passes <= _USABLE * memory.free:
            return count
    return 1
