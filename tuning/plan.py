"""Owns the plan: what a sweep is about to do and need, in numbers, before anything starts; and afterwards, how right that was.

Memory is counted, not guessed: base, adapters with gradients and Adam's two moments, and what a layer keeps of a token for its
backward. Time is the arithmetic of the base and the memory that layers move, at a device's measured speeds, with what every step
and every first pass of a size costs a GPU's host, for as many trials as ASHA lets through.
"""

import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qlora.base.model import CPU_PASS_TOKENS
from qlora.config import InputError, TrialSettings
from qlora.data.prompts import EncodedExample
from qlora.lora.bank import is_targeted, unknown_targets
from qlora.lora.products import MAX_GPU_RANK
from qlora.packed.packing import split_by_budget, whole_group
from qlora.training import make_timetable
from tuning.device import Device
from tuning.progress import clock
from tuning.space import CHOICES, Asha, Space

# a parameter: float32 weight, gradient and two moments; plus a copy in the model's dtype
_ADAPTER_BYTES = 16
_NF4_BYTES = 0.516  # a parameter: half a byte, and doubly quantised scales for blocks of 64
# of activations: what kernels need while they work, and what an allocator can't use
_SLACK = 1.15
_GPU_PASS_TOKENS = 24576  # of a pass: more of them make no kernel faster
_MOST_TRIALS = 8  # of a device, unless told: more of them gain little once passes are full
_RESERVE_BYTES = 2 << 30  # a CUDA context and its libraries
_START_SECONDS = 30  # Ray, the first host, its base
_CPU_ARITHMETIC = 0.55  # of a training pass's time on a CPU that is products of the base
# Of a GPU, from steps of one and eight trials of the shapes of 135 million, 1.1 and 7 billion parameters on an H100:
_MOVED_NUMBERS = 16  # by a training pass, for each number that a linear layer takes or gives
_STEP_SECONDS, _TRIAL_SECONDS = 0.015, 0.0025  # of the host: a step, and each trial in it
# sizes of pass that come up in a sweep; recording one, a layer
_RECORDINGS, _RECORDING_SECONDS = 30, 0.012


@dataclass(frozen=True)
class ModelSize:
    """A base in numbers: parameters of its linear layers (without the head) and of the rest, their widths, and what a token leaves
    behind in a training pass."""

    linear: int
    other: int
    widths: tuple[tuple[str, int, int], ...]
    vocabulary: int
    hidden: int
    num_layers: int
    kept_numbers: int

    def adapter_parameters(self, settings: TrialSettings) -> int:
        """Parameters of a trial's adapter."""
        wanted = settings.target_modules
        return sum(
            settings.lora_r * (rows + columns)
            for name, rows, columns in self.widths
            if is_targeted(name, wanted)
        )


@dataclass(frozen=True)
class Plan:
    """What a sweep needs on each of its devices, in bytes and seconds. `trials`: side by side on a device. `adapter_bytes`: of a trial with
    what training needs beside its adapter; at most, and of one with middling settings."""

    base_bytes: int
    adapter_bytes: int
    mean_adapter_bytes: int
    activation_bytes: int
    budget_tokens: int
    trials: int
    disk_bytes: int
    num_devices: int
    seconds: float
    seconds_without_stopping: float

    @property
    def most_bytes(self) -> int:
        """Of a device that trains all of its trials, each of them the largest that the space allows."""
        return self.base_bytes + self.trials * self.adapter_bytes + self.activation_bytes

    @property
    def peak_bytes(self) -> int:
        """What is to be expected: trials of middling settings."""
        return self.base_bytes + self.trials * self.mean_adapter_bytes + self.activation_bytes


def model_size(config: Any) -> ModelSize:
    """Read off a model of this config that has no weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head, text = model.get_output_embeddings(), config.get_text_config()
    linear = [
        (name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    size = sum(rows * columns for _, rows, columns in linear)
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    # Both norms' inputs and outputs, queries, keys, values, attention's output, and gate, up and their product.
    kept = (
        4 * text.hidden_size
        + 2 * (heads + kv_heads) * head_dim
        + 3 * getattr(text, "intermediate_size", 4 * text.hidden_size)
    )
    return ModelSize(
        size,
        sum(p.numel() for p in model.parameters()) - size,
        tuple(linear),
        text.vocab_size,
        text.hidden_size,
        text.num_hidden_layers,
        text.num_hidden_layers * kept,
    )


def make_plan(
    space: Space,
    train: Sequence[EncodedExample],
    public: Sequence[EncodedExample],
    size: ModelSize,
    device: Device,
    num_devices: int = 1,
) -> Plan:
    """The plan of a sweep on one or several such devices.

    Raises InputError, naming what to change, for target modules that the base lacks, and if the trials don't fit.
    """
    for wanted in _values(space, "target_modules") or [space.trial_settings({}).target_modules]:
        if unknown := unknown_targets(wanted, [name for name, *_ in size.widths]):
            raise InputError("target_modules", unknown)
    rank = max(settings.lora_r for settings in _extremes(space))
    if device.kind == "cuda" and rank > MAX_GPU_RANK:
        raise InputError("lora_r", f"{rank} is more than the {MAX_GPU_RANK} that a GPU takes")
    settings = space.base_model
    width = 2 if settings.dtype == "bfloat16" or (settings.dtype == "auto" and device.has_bfloat16) else 4
    free = device.free_bytes - (_RESERVE_BYTES if device.kind == "cuda" else 0)
    dense = size.linear * width
    keeps_nf4 = space.base_model.quantization == "nf4" and 2 * dense >= free
    base = size.other * width + (int(size.linear * _NF4_BYTES) if keeps_nf4 else dense)
    of_parameter = _ADAPTER_BYTES + (width if width < 4 else 0)
    adapter = of_parameter * max(size.adapter_parameters(settings) for settings in _extremes(space))
    middling = of_parameter * statistics.fmean(
        size.adapter_parameters(settings) for settings in _extremes(space, statistics.fmean)
    )
    answers = sum(len(example.answer) for example in train) / sum(example.num_tokens for example in train)
    # Of scored tokens, logits in the model's dtype and their gradient, and float32 logits and theirs.
    token = _SLACK * (size.kept_numbers * width + answers * size.vocabulary * (2 * width + 8))
    step = _step_tokens(space, train)
    least = base + adapter + int(min(step, _longest(train)) * token)
    if least > free:
        raise InputError(
            "base_model",
            f"a trial needs {_gib(least)} on a device (base {_gib(base)}, adapter and optimizer "
            f"{_gib(adapter)}), but {_gib(free)} are free; choose a smaller base or lora_r, or a larger device",
        )
    trials = _side_by_side(space)
    needed = least + ((trials or 1) - 1) * adapter
    if trials is not None and needed > free:
        raise InputError(
            "trials_per_gpu",
            f"{trials} trials need {_gib(needed)} on a device, but {_gib(free)} are free; lower it, "
            "or set it to auto",
        )
    if trials is None:
        # no device idles while another is crowded
        most = min(_MOST_TRIALS, -(-space.num_trials // num_devices))
        trials = next(
            count
            for count in range(most, 0, -1)
            if count == 1 or base + count * adapter + int(min(count, 2) * step * token) <= 0.9 * free
        )
    room = int((0.9 * free - base - trials * adapter) / token)
    largest = math.ceil(trials * step + 3 * _deviation(train) * math.sqrt(trials * _batch_size(space)))
    budget = space.budget_tokens or max(
        min(room, largest, _GPU_PASS_TOKENS if device.kind == "cuda" else CPU_PASS_TOKENS), _longest(train)
    )
    seconds, unstopped = _expected_seconds(space, train, public, size, device, trials, num_devices)
    kept = 2 * space.num_trials * adapter * 12 // _ADAPTER_BYTES
    return Plan(
        base,
        adapter,
        int(middling),
        int(min(budget, largest) * token),
        budget,
        trials,
        kept,
        num_devices,
        seconds,
        unstopped,
    )


def describe_plan(
    space: Space, train: Sequence[EncodedExample], public: Sequence[EncodedExample], plan: Plan | None
) -> str:
    """A few lines: base, data, trials, schedule lengths and rungs, memory, disk and time; without a plan, what does not need one."""
    prefix = whole_group([*train, *public]).prefix_length
    tokens = sum(example.num_tokens for example in train)
    fixed = space.trial_settings({})
    searched = ", ".join(
        f"{key} {name}{value}" for key, sampler in space.search.items() for name, value in sampler.items()
    )
    lines = [
        f"base        {space.base_model.name} ({space.base_model.quantization}, {space.base_model.dtype})",
        f"train       {len(train)} examples of {space.data.train}, {tokens / len(train):.0f} tokens on average",
        f"public      {len(public)} examples of {space.data.public}; all prompts share {prefix} tokens",
        f"search      {searched}",
        f"trials      {space.num_trials} by {space.searcher.type} search",
        f"epoch       {make_timetable(len(train), fixed).steps_per_epoch} steps of {fixed.batch_size} examples",
    ]
    if isinstance(space.scheduler, Asha):
        unit = "% of a trial's schedule" if space.scheduler.time_attr == "schedule_percent" else " steps"
        rungs = ", ".join(f"{rung:g}" for rung in space.scheduler.rungs)
        lines.append(
            f"ASHA        compares at {rungs}{unit}, keeps 1 of {space.scheduler.reduction_factor:g}"
        )
    if plan is not None:
        lines += [
            f"device      {plan.trials} trials side by side on one base, passes of up to {plan.budget_tokens} tokens",
            f"memory      {_gib(plan.peak_bytes)} a device: base {_gib(plan.base_bytes)}, adapters and optimizers {plan.trials} x "
            f"{_gib(plan.mean_adapter_bytes)}, activations {_gib(plan.activation_bytes)}; at most {_gib(plan.most_bytes)}",
            f"disk        up to {_gib(plan.disk_bytes)} of checkpoints, two a trial",
        ]
        unstopped = _minutes(plan.seconds_without_stopping)
        devices = "one device" if plan.num_devices == 1 else f"{plan.num_devices} devices"
        lines.append(
            f"time        about {_minutes(plan.seconds)} on {devices}, {unstopped} if nothing is stopped"
        )
    else:
        lines.append("device      no GPU here to plan for")
    return "\n".join(lines)


def compare_with_run(plan: Plan, peak_gib: float, seconds: float) -> str:
    """The plan's peak memory (of a GPU) and time beside those measured."""
    memory = f"peak memory {_gib(plan.peak_bytes)} planned, {peak_gib:.1f} GiB measured; " if peak_gib else ""
    return f"plan        {memory}time {clock(plan.seconds)} planned, {clock(seconds)} measured"


def _side_by_side(space: Space) -> int | None:
    """Trials that share a device as the space has it; None if it leaves that to the plan."""
    if space.trials_per_gpu == "auto":
        return None
    gpu = 1 / space.trials_per_gpu if space.trials_per_gpu else space.resources_per_trial.gpu
    trials = (
        int(1 / gpu + 1e-3)
        if gpu
        else max(1, int((os.cpu_count() or 1) / max(space.resources_per_trial.cpu, 1e-3)))
    )
    return max(1, min(trials, space.num_trials, space.max_concurrent_trials or trials))


def _extremes(space: Space, of_ranks: Callable[[list[Any]], float] = max) -> list[TrialSettings]:
    """Settings that need the most memory: the largest rank, or another `of_ranks`, with every choice of target modules."""
    ranks = _values(space, "lora_r") or [space.trial_settings({}).lora_r]
    targets = _values(space, "target_modules")
    highest = {"lora_r": int(of_ranks(ranks))}
    return [
        space.trial_settings({**highest, **({"target_modules": value} if targets else {})})
        for value in targets or [None]
    ]


def _values(space: Space, key: str) -> list[Any]:
    """The choices, or both ends, of a searched setting; none if it is not searched."""
    sampler = space.search.get(key, {})
    return [
        value
        for name, arguments in sampler.items()
        for value in (arguments if name in CHOICES else arguments[:2])
    ]


def _step_tokens(space: Space, train: Sequence[EncodedExample]) -> int:
    """Stream tokens of an optimizer step on examples of average length."""
    group = whole_group(train)
    own = (group.num_tokens - group.prefix_length) / len(train)
    return math.ceil(group.prefix_length + own * min(_batch_size(space), len(train)))


def _batch_size(space: Space) -> int:
    """The largest that a trial may have."""
    return int(max([space.trial_settings({}).batch_size, *_values(space, "batch_size")]))


def _deviation(train: Sequence[EncodedExample]) -> float:
    """Standard deviation of an example's tokens."""
    return statistics.pstdev(example.num_tokens for example in train)


def _longest(train: Sequence[EncodedExample]) -> int:
    return max(example.num_tokens for example in train)


def _expected_seconds(
    space: Space,
    train: Sequence[EncodedExample],
    public: Sequence[EncodedExample],
    size: ModelSize,
    device: Device,
    side_by_side: int,
    num_devices: int,
) -> tuple[float, float]:
    """(with early stopping, without), with as many trials on each device."""
    fixed = space.trial_settings({})
    epochs = [sum(space.trial_settings({"epochs": value}).stages) for value in _values(space, "epochs")] or [
        sum(fixed.stages)
    ]
    mean_epochs = sum(epochs) / len(epochs)
    steps = make_timetable(len(train), fixed).steps_per_epoch
    answers = sum(len(example.answer) for example in train) / sum(example.num_tokens for example in train)
    step = _token_seconds(size, device, answers) * _step_tokens(space, train)
    evaluation = (
        _token_seconds(size, device, answers)
        / 2
        * sum(group.num_tokens for group in split_by_budget(public, 32768))
    )
    start = float(_START_SECONDS)
    if device.kind == "cuda":
        step += _STEP_SECONDS / side_by_side + _TRIAL_SECONDS
        start += _RECORDINGS * _RECORDING_SECONDS * size.num_layers
    points: list[float] = [100.0]
    if isinstance(space.scheduler, Asha):
        unit = 1.0 if space.scheduler.time_attr == "schedule_percent" else 100 / (steps * mean_epochs)
        points = [
            unit * rung for rung in (*space.scheduler.rungs, space.scheduler.max_t) if unit * rung < 100
        ] + [100.0]

    def seconds(trials: list[float]) -> float:
        """`trials`: that train up to each point."""
        stretches = [end - start for start, end in zip([0.0, *points], points, strict=False)]
        whole = sum(count * stretch / 100 for count, stretch in zip(trials, stretches, strict=True))
        work = whole * mean_epochs * steps * step + (sum(trials) + whole * (mean_epochs - 1)) * evaluation
        return start + work / min(num_devices, space.num_trials)

    everyone = [float(space.num_trials)] * len(points)
    survivors = list(everyone)
    if isinstance(space.scheduler, Asha):
        for index in range(1, len(points)):
            survivors[index] = _let_through(survivors[index - 1], space.scheduler.reduction_factor)
    return seconds(survivors), seconds(everyone)


def _let_through(trials: float, reduction_factor: float) -> float:
    """Trials that Ray Tune's ASHA lets pass a rung which so many reach one after another, in an order that says nothing about them: the
    first, and of the others each that is better than a quantile of those before it. About 1 of `reduction_factor`, and one or two."""
    share, count = 1 - 1 / reduction_factor, round(trials)
    return min(trials, 1 + sum(1 - (share * (number - 2) + 1) / number for number in range(2, count + 1)))


def _token_seconds(size: ModelSize, device: Device, answers: float) -> float:
    """Of a token in a training pass: two products with every frozen weight forward and two backward, the head's for answers only."""
    arithmetic = 4 * (size.linear + size.vocabulary * size.hidden * answers) / device.speed
    if device.kind == "cpu":
        return arithmetic / _CPU_ARITHMETIC
    width = 2 if device.has_bfloat16 else 4
    return (
        arithmetic
        + _MOVED_NUMBERS * width * sum(rows + columns for _, rows, columns in size.widths) / device.bandwidth
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
