"""Owns the time that a sweep is expected to take: arithmetic and memory traffic at a device's speeds.

Added to them is what every step, every evaluation and every first pass of a size costs a GPU's host; and the
sweep is played (tuning.plan_play). Constants of a GPU are from steps of one to eight trials of shapes of 135
million to 70 billion parameters on H100s and H200s, and from 36 sweeps of the first on H200s without Liger.
"""

from collections.abc import Sequence
from dataclasses import replace

from qlora.data.prompts import EncodedExample
from qlora.packed.packing import split_by_budget
from tuning.device import Device
from tuning.model_size import ModelSize
from tuning.plan_play import Pace, played_seconds
from tuning.soup import AVERAGES_SHARE, FINALISTS
from tuning.space import Space

START_SECONDS = 30  # Ray, the first host, its base
_CPU_ARITHMETIC = 0.55  # of a training pass's time on a CPU that is products of the base
# By a training pass, for each number that a linear layer takes or gives, with Liger's kernels and without.
_MOVED_NUMBERS, _MOVED_UNFUSED = 14, 29
_STEP_SECONDS, _TRIAL_SECONDS = 0.018, 0.003  # of a GPU's host: a step, and each trial in it
_EVALUATION_SECONDS = 0.15  # of a GPU's host: one trial
# Of a trial on a GPU: its process, and drawing a weight; a weight of a report, which has its moments, too; a
# weight of a member that an average reads.
_START_SECONDS, _DRAW_SECONDS, _REPORT_SECONDS, _READ_SECONDS = 1.0, 8e-9, 16e-9, 12e-9
_RECORDINGS, _RECORDING_SECONDS = 30, 0.012  # sizes of pass that come up in a sweep; recording one, a layer
_RECOMPUTED = 1.5  # passes that one takes whose layers are computed again
# Bytes, for each number of a base that stays in NF4, whenever a pass dequantises it.
_DEQUANTISED_BYTES = 8
_EVALUATION_TOKENS = 32768  # of an evaluation's pass
# A training pass's time, in evaluations of its tokens: two cores; an H200 with the embedded base's shape.
_OF_EVALUATION = {"cpu": 2.6, "cuda": 3.7}


def expected_seconds(
    space: Space,
    train: Sequence[EncodedExample],
    public: Sequence[EncodedExample],
    size: ModelSize,
    device: Device,
    *,
    step_tokens: int,
    side_by_side: int,
    num_devices: int,
    pass_tokens: int,
    num_weights: float,
    keeps_nf4: bool = False,
    recomputes: bool = False,
) -> tuple[float, float]:
    """Return the seconds of a sweep with early stopping and without.

    There are `num_devices` devices with `side_by_side` trials on each; a step has `step_tokens` stream
    tokens, a pass at most `pass_tokens`, a trial's adapter `num_weights`. `keeps_nf4`, `recomputes`: see
    TrainingMemory.
    """
    step, trial = step_seconds(
        size,
        device,
        answer_share(train),
        step_tokens=step_tokens,
        pass_tokens=pass_tokens,
        keeps_nf4=keeps_nf4,
        recomputes=recomputes,
    )
    evaluation = evaluation_seconds(train, public, size, device)
    pace = Pace(step, trial, evaluation, side_by_side)
    start = float(START_SECONDS)
    if device.kind == "cuda":
        pace = replace(
            pace,
            evaluation_seconds=evaluation + _EVALUATION_SECONDS,
            start_seconds=_START_SECONDS + _DRAW_SECONDS * num_weights,
            report_seconds=_REPORT_SECONDS * num_weights,
        )
        start += 0 if recomputes else _RECORDINGS * _RECORDING_SECONDS * size.num_layers
    stopped, whole = (
        played_seconds(space, len(train), pace, num_devices, stops=stops) for stops in (True, False)
    )
    if not (space.soup and space.objective.is_perplexity):
        return start + stopped, start + whole
    if device.kind == "cuda":
        start += min(space.num_trials, FINALISTS) * _READ_SECONDS * num_weights
    return start + (1 + AVERAGES_SHARE) * stopped, start + (1 + AVERAGES_SHARE) * whole


def step_seconds(
    size: ModelSize,
    device: Device,
    answers: float,
    *,
    step_tokens: int,
    pass_tokens: int,
    keeps_nf4: bool = False,
    recomputes: bool = False,
) -> tuple[float, float]:
    """Return the seconds of a step of trials side by side: those of itself, and those of each trial.

    `answers`: the share of tokens that are. A base that stays in NF4 is dequantised in each pass's forward
    and backward; the last of a step's passes is half full on average.
    """
    again = _RECOMPUTED if recomputes else 1.0
    trial = again * _token_seconds(size, device, answers) * step_tokens
    if device.kind == "cpu":
        return 0.0, trial
    times = 3 if recomputes else 2
    dequantised = times * size.linear * _DEQUANTISED_BYTES / device.bandwidth if keeps_nf4 else 0.0
    step = _STEP_SECONDS + dequantised / 2
    return step, trial + _TRIAL_SECONDS + dequantised * step_tokens / pass_tokens


def evaluation_seconds(
    train: Sequence[EncodedExample], public: Sequence[EncodedExample], size: ModelSize, device: Device
) -> float:
    """Return the seconds that measuring the public examples is expected to take."""
    tokens = sum(group.num_tokens for group in split_by_budget(public, _EVALUATION_TOKENS))
    return _token_seconds(size, device, answer_share(train)) / _OF_EVALUATION[device.kind] * tokens


def answer_share(train: Sequence[EncodedExample]) -> float:
    """Return the share of tokens that are answers, whose logits are computed."""
    return sum(example.num_scored for example in train) / sum(example.num_tokens for example in train)


def _token_seconds(size: ModelSize, device: Device, answers: float) -> float:
    """Return the seconds of a token in a training pass.

    Two products with every frozen weight forward and two backward, the head's for answers only.
    """
    arithmetic = 4 * (size.linear + size.vocabulary * size.hidden * answers) / device.speed
    if device.kind == "cpu":
        return arithmetic / _CPU_ARITHMETIC
    width = 2 if device.has_bfloat16 else 4
    moved = _MOVED_NUMBERS if device.fuses_mlp else _MOVED_UNFUSED
    return arithmetic + moved * width * size.layer_widths / device.bandwidth
