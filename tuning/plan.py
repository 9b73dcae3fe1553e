"""Owns the plan: what a sweep is about to need, in numbers, before anything starts.

Memory is counted, not guessed: base, adapters with gradients and Adam's two moments, what layers keep of a
token for their backward, and logits. Passes that are recorded have rounded sizes (qlora.pass_buffers).
Time is estimated by tuning.plan_time.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qlora.base.device import CPU_PASS_TOKENS
from qlora.config import InputError, TrialSettings
from qlora.data.prompts import EncodedExample
from qlora.lora.bank import unknown_targets
from qlora.lora.products import MAX_GPU_RANK
from qlora.lora.tables import padded_rank
from qlora.packed.packing import whole_group
from qlora.pass_buffers import rounded_up
from qlora.recorded_passes import launch_bound_tokens
from tuning.device import Device
from tuning.model_size import ModelSize
from tuning.plan_time import expected_seconds
from tuning.space import Space

_ADAPTER_BYTES = 16  # a parameter: float32 weight, gradient and two moments; plus a copy in the model's dtype
_CHECKPOINT_BYTES = 12  # a parameter: weight and two moments
_CHECKPOINTS = 2  # of a trial on disk
_NF4_BYTES = 0.516  # a parameter: half a byte, and doubly quantised scales for blocks of 64
_LOGIT_BYTES = 12  # float32, in a backward: their log-softmax, its gradient and their own
_SLACK = 1.1  # of activations, where room is looked for: what an allocator can't use
_USABLE = 0.9  # of free memory
_GPU_PASS_TOKENS = 24576  # more of them make no kernel faster
_MOST_TRIALS = 8  # of a device, unless told: more of them gain little once passes are full
_RESERVE_BYTES = 2 << 30  # a CUDA context and its libraries


@dataclass(frozen=True)
class Plan:
    """The needs of a sweep on each of its devices, in bytes and seconds.

    trials: side by side on a device. adapter_bytes: of a trial with what training needs beside its adapter,
    at most; mean_adapter_bytes: of one with middling settings. recomputes: layers are computed again in the
    backward, since memory is too short for what they would keep (qlora.base.recomputed).
    """

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
    recomputes: bool = False

    @property
    def most_bytes(self) -> int:
        """Return a device's memory with all of its trials, each the largest that the space allows."""
        return self.base_bytes + self.trials * self.adapter_bytes + self.activation_bytes

    @property
    def peak_bytes(self) -> int:
        """Return the memory to be expected: trials of middling settings."""
        return self.base_bytes + self.trials * self.mean_adapter_bytes + self.activation_bytes


def make_plan(
    space: Space,
    train: Sequence[EncodedExample],
    public: Sequence[EncodedExample],
    size: ModelSize,
    device: Device,
    num_devices: int = 1,
    num_others: int = 0,
) -> Plan:
    """Plan a sweep on one or several such devices, with `num_others` of other kinds beside them.

    Raises InputError, naming what to change, for target modules that the base lacks, and if the trials don't
    fit.
    """
    _check_settings(space, size, device)
    width = _width(space, device)
    free = device.free_bytes - (_RESERVE_BYTES if device.kind == "cuda" else 0)
    base = _base_bytes(space, size, width, free)
    of_parameter = _ADAPTER_BYTES + (width if width < 4 else 0)
    adapter = of_parameter * max(map(size.adapter_parameters, _settings_by_rank(space, max)))
    middling = of_parameter * statistics.fmean(
        map(size.adapter_parameters, _settings_by_rank(space, statistics.fmean))
    )
    step, longest = step_tokens(space, train), max(example.num_tokens for example in train)
    trials = _asked_side_by_side(space, device)
    for recomputes in (False, True) if size.can_recompute else (False,):
        activations = partial(_activation_bytes, space, train, size, device, width, recomputes)
        least = base + adapter + int(activations(longest))
        if least + ((trials or 1) - 1) * adapter <= free:
            break
    if least > free:
        raise InputError(
            "base_model",
            f"a trial needs {gib(least)} on a device (base {gib(base)}, adapter and optimizer "
            f"{gib(adapter)}), but {gib(free)} are free; choose a smaller base or lora_r, or a larger device",
        )
    if trials is None:
        most = min(
            _MOST_TRIALS, -(-space.num_trials // (num_devices + num_others))
        )  # no device idles while another is crowded
        trials = _fitting(
            most,
            lambda count: base + count * adapter + _SLACK * activations(min(count, 2) * step),
            _USABLE * free,
        )
    elif (needed := least + (trials - 1) * adapter) > free:
        raise InputError(
            "trials_per_gpu",
            f"{trials} trials need {gib(needed)} on a device, but {gib(free)} are free; lower it, "
            "or set it to auto",
        )
    largest = _largest_pass(space, train, trials)
    most_tokens = min(largest, _GPU_PASS_TOKENS if device.kind == "cuda" else CPU_PASS_TOKENS)
    token = _SLACK * activations(most_tokens) / most_tokens
    room = int((_USABLE * free - base - trials * adapter) / token)
    budget = space.budget_tokens or max(min(room, most_tokens), longest)
    seconds, unstopped = expected_seconds(
        space,
        train,
        public,
        size,
        device,
        step_tokens=step,
        side_by_side=trials,
        num_devices=num_devices,
        recomputes=recomputes,
    )
    return Plan(
        base_bytes=base,
        adapter_bytes=adapter,
        mean_adapter_bytes=int(middling),
        activation_bytes=int(activations(min(budget, largest))),
        budget_tokens=budget,
        trials=trials,
        disk_bytes=_CHECKPOINTS * space.num_trials * adapter * _CHECKPOINT_BYTES // _ADAPTER_BYTES,
        num_devices=num_devices,
        seconds=seconds,
        seconds_without_stopping=unstopped,
        recomputes=recomputes,
    )


def step_tokens(space: Space, train: Sequence[EncodedExample]) -> int:
    """Return the stream tokens of an optimizer step on examples of average length."""
    group = whole_group(train)
    own = (group.num_tokens - group.prefix_length) / len(train)
    return math.ceil(group.prefix_length + own * min(_batch_size(space), len(train)))


def gib(count: float) -> str:
    """Write bytes in GiB."""
    return f"{count / 2**30:.1f} GiB"


def _check_settings(space: Space, size: ModelSize, device: Device) -> None:
    for wanted in space.values("target_modules"):
        targets = space.trial_settings({"target_modules": wanted}).target_modules
        if unknown := unknown_targets(targets, list(size.layers)):
            raise InputError("target_modules", unknown)
    rank = max(space.values("lora_r"))
    if device.kind == "cuda" and rank > MAX_GPU_RANK:
        raise InputError("lora_r", f"{rank:g} is more than the {MAX_GPU_RANK} that a GPU takes")


def _width(space: Space, device: Device) -> int:
    """Return the bytes of a number in the model's dtype."""
    dtype = space.base_model.dtype
    return 2 if dtype == "bfloat16" or (dtype == "auto" and device.has_bfloat16) else 4


def _base_bytes(space: Space, size: ModelSize, width: int, free: int) -> int:
    """Return what the base takes.

    Its NF4 values are dequantised if half of the free memory has room for them.
    """
    dense = size.linear * width
    keeps_nf4 = space.base_model.quantization == "nf4" and 2 * dense >= free
    return size.other * width + (int(size.linear * _NF4_BYTES) if keeps_nf4 else dense)


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


def _fitting(most: int, needed_bytes: Callable[[int], float], free_bytes: float) -> int:
    for count in range(most, 1, -1):
        if needed_bytes(count) <= free_bytes:
            return count
    return 1


def _largest_pass(space: Space, train: Sequence[EncodedExample], trials: int) -> int:
    """Estimate the tokens that all trials' steps have together in a thousand steps' largest."""
    deviation = statistics.pstdev(example.num_tokens for example in train)
    return math.ceil(
        trials * step_tokens(space, train) + 3 * deviation * math.sqrt(trials * _batch_size(space))
    )


def _activation_bytes(
    space: Space,
    train: Sequence[EncodedExample],
    size: ModelSize,
    device: Device,
    width: int,
    recomputes: bool,
    tokens: int,
) -> float:
    """Count the memory of a training pass of so many stream tokens, beside base and adapters.

    Layers keep what their backward reads: the inputs and outputs of norms; queries, keys, values and
    attention's output, on a CPU with every head's keys and values besides, for prefixes of about a row's
    length; gate, up and their product, and the activated gate unless that is fused; of adapters, what A
    gives, and on a CPU the masks of their dropout, a byte each. Beside it stand one layer's gradients.
    """
    is_on_gpu = device.kind == "cuda"
    settings = _settings_by_rank(space, max)
    inputs = [size.adapted_inputs(one) for one in settings]
    low_width = max(padded_rank(one.lora_r) * len(own) for one, own in zip(settings, inputs, strict=True))
    has_masks = not is_on_gpu and max(space.values("lora_dropout")) > 0
    kept: float = (
        2 * size.norm_width
        + (1 if is_on_gpu else 3) * size.attention_width
        + (3 if device.fuses_mlp else 4) * size.mlp_width
        + low_width
        + (max(map(sum, inputs)) / width if has_masks else 0)
    )
    answers = _scored(space, train, tokens)
    beside = kept / size.num_layers
    if recomputes:  # layers keep their inputs, and one of them what all would keep
        kept = size.norm_width / 2 + beside
    elif is_on_gpu and tokens <= launch_bound_tokens(size.linear / len(size.layers)):
        tokens, answers = rounded_up(tokens, answers)
    logits = answers * size.vocabulary * _LOGIT_BYTES
    return tokens * (kept + beside) * width + logits


def _scored(space: Space, train: Sequence[EncodedExample], tokens: int) -> int:
    """Estimate the answers' tokens in so many stream tokens, in a thousand passes' fullest."""
    counts = [example.num_scored for example in train]
    examples = tokens / step_tokens(space, train) * min(_batch_size(space), len(train))
    fullest = examples * statistics.fmean(counts) + 3 * math.sqrt(examples) * statistics.pstdev(counts)
    return min(math.ceil(fullest), tokens)


def _settings_by_rank(space: Space, of_ranks: Callable[[list[Any]], float]) -> list[TrialSettings]:
    """Return settings with one rank of those that are searched, and every choice of target modules."""
    rank = int(of_ranks(space.values("lora_r")))
    return [
        space.trial_settings({"lora_r": rank, "target_modules": targets})
        for targets in space.values("target_modules")
    ]


def _batch_size(space: Space) -> int:
    """Return the largest batch that a trial may have."""
    return int(max(space.values("batch_size")))
