"""Owns the time that a sweep is expected to take: arithmetic and memory traffic at a device's speeds.

Added to them is what every step and every first pass of a size costs a GPU's host; and trials are counted as
early stopping lets them through. Constants of a GPU are from steps of one and eight trials of the shapes of
135 million, 1.1 and 7 billion parameters on an H100.
"""

from collections.abc import Sequence

from qlora.data.prompts import EncodedExample
from qlora.packed.packing import split_by_budget
from qlora.training import make_timetable
from tuning.device import Device
from tuning.model_size import ModelSize
from tuning.space import Space
from tuning.strategy import Asha, Rounds

START_SECONDS = 30  # Ray, the first host, its base
_CPU_ARITHMETIC = 0.55  # of a training pass's time on a CPU that is products of the base
_MOVED_NUMBERS = 16  # by a training pass, for each number that a linear layer takes or gives
_STEP_SECONDS, _TRIAL_SECONDS = 0.015, 0.0025  # of the host: a step, and each trial in it
_RECORDINGS, _RECORDING_SECONDS = 30, 0.012  # sizes of pass that come up in a sweep; recording one, a layer
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
) -> tuple[float, float]:
    """Return the seconds of a sweep with early stopping and without.

    There are `num_devices` devices with `side_by_side` trials on each; a step has `step_tokens` stream
    tokens.
    """
    epochs = [sum(space.trial_settings({"epochs": value}).stages) for value in space.values("epochs")]
    mean_epochs = sum(epochs) / len(epochs)
    steps_per_epoch = make_timetable(len(train), space.trial_settings({})).steps_per_epoch
    step = _token_seconds(size, device, answer_share(train)) * step_tokens
    evaluation = evaluation_seconds(train, public, size, device)
    start = float(START_SECONDS)
    if device.kind == "cuda":
        step += _STEP_SECONDS / side_by_side + _TRIAL_SECONDS
        start += _RECORDINGS * _RECORDING_SECONDS * size.num_layers
    points = _comparison_points(space, steps_per_epoch * mean_epochs)

    def seconds(trials: list[float]) -> float:
        """Add up the work of trials, so many of which train up to each point."""
        stretches = [end - begin for begin, end in zip([0.0, *points], points, strict=False)]
        schedules = sum(count * stretch / 100 for count, stretch in zip(trials, stretches, strict=True))
        training = schedules * mean_epochs * steps_per_epoch * step
        evaluations = sum(trials) + schedules * (mean_epochs - 1)
        return start + (training + evaluations * evaluation) / min(num_devices, space.num_trials)

    everyone = [float(space.num_trials)] * len(points)
    survivors = list(everyone)
    if isinstance(space.scheduler, Asha):
        for index in range(1, len(points)):
            survivors[index] = let_through(survivors[index - 1], space.scheduler.reduction_factor)
    elif isinstance(space.scheduler, Rounds):
        survivors[1:] = [float(space.scheduler.survivors(space.num_trials)) for _ in survivors[1:]]
    return seconds(survivors), seconds(everyone)


def evaluation_seconds(
    train: Sequence[EncodedExample], public: Sequence[EncodedExample], size: ModelSize, device: Device
) -> float:
    """Return the seconds that measuring the public examples is expected to take."""
    tokens = sum(group.num_tokens for group in split_by_budget(public, _EVALUATION_TOKENS))
    return _token_seconds(size, device, answer_share(train)) / _OF_EVALUATION[device.kind] * tokens


def answer_share(train: Sequence[EncodedExample]) -> float:
    """Return the share of tokens that are answers, whose logits are computed."""
    return sum(example.num_scored for example in train) / sum(example.num_tokens for example in train)


def _comparison_points(space: Space, steps: float) -> list[float]:
    """Return where trials are compared, in percent of a schedule of so many steps, up to its end."""
    if isinstance(space.scheduler, Rounds):
        first = 100 * space.scheduler.steps / steps
        return [first, 100.0] if first < 100 else [100.0]
    if not isinstance(space.scheduler, Asha):
        return [100.0]
    unit = 1.0 if space.scheduler.time_attr == "schedule_percent" else 100 / steps
    points = [unit * rung for rung in (*space.scheduler.rungs, space.scheduler.max_t)]
    return [*(point for point in points if point < 100), 100.0]


def let_through(trials: float, reduction_factor: float) -> float:
    """Estimate the trials that ASHA lets pass a rung which so many reach one after another.

    In an order that says nothing about them: the first, and of the others each that is better than a quantile
    of those before it. That is about 1 of `reduction_factor`, and one or two.
    """
    share, count = 1 - 1 / reduction_factor, round(trials)
    later = sum(1 - (share * (number - 2) + 1) / number for number in range(2, count + 1))
    return min(trials, 1 + later)


def _token_seconds(size: ModelSize, device: Device, answers: float) -> float:
    """Return the seconds of a token in a training pass.

    Two products with every frozen weight forward and two backward, the head's for answers only.
    """
    arithmetic = 4 * (size.linear + size.vocabulary * size.hidden * answers) / device.speed
    if device.kind == "cpu":
        return arithmetic / _CPU_ARITHMETIC
    width = 2 if device.has_bfloat16 else 4
    return arithmetic + _MOVED_NUMBERS * width * size.layer_widths / device.bandwidth
