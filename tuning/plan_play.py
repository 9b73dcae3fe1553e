"""Owns the playing of a sweep: how long its trials take together, before any of them is there.

Trials take seats, train in company and are measured; chance says how good they are, and so who is stopped.
What makes sweeps long, schedules that are left to train alone, is in no sum of their work.
"""

import bisect
import math
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from tuning.space import Space
from tuning.strategy import EPOCHS_POWER, Asha, NoEarlyStopping, Rounds

_PLAYS, _MANY_TRIALS = 24, 200  # of more trials, luck evens out in one play
_NEARLY = 1e-6  # of a step
_OF_STEPS = 0.25  # of all differences in quality: what twice the steps bring, at one share of schedules


@dataclass(frozen=True)
class Pace:
    """The seconds that a device takes for a step of its trials, itself and each trial in it.

    evaluation_seconds: to measure one trial. seats: trials side by side.
    """

    step_seconds: float
    trial_seconds: float
    evaluation_seconds: float
    seats: int


@dataclass
class _Trial:
    """A trial that is played.

    quality: less is better, at any time. points: steps at which it is yet to be measured, the last its end.
    rungs: those of them at which it is compared. may_pause: it is yet to wait for its round.
    """

    quality: float
    points: deque[float]
    rungs: dict[float, "Rung"]
    may_pause: bool
    done: float = 0.0


class Rung:
    """A point of ASHA's, and the trials that came there; less is better."""

    def __init__(self, reduction_factor: float):
        self._share, self._values = 1 / reduction_factor, list[float]()  # ascending

    def lets_through(self, value: float) -> bool:
        """Tell whether a trial goes on: the first does, and who is no worse than so many of those before."""
        before, place = self._values, self._share * (len(self._values) - 1)
        if not before:
            is_good = True
        else:
            low, high = before[int(place)], before[min(int(place) + 1, len(before) - 1)]
            is_good = value <= low + (high - low) * (place - int(place))
        bisect.insort(before, value)
        return is_good


def played_seconds(
    space: Space, steps_per_epoch: int, pace: Pace, num_devices: int, *, stops: bool = True
) -> float:
    """Return the mean seconds of some plays of a sweep's trials, the same in every call.

    `stops`: weak trials are stopped, as the space's scheduler does it, and not only compared.
    """
    generator = random.Random(0)
    count = _PLAYS if space.num_trials <= _MANY_TRIALS else 1
    plays = (_play(space, steps_per_epoch, pace, num_devices, stops, generator) for _ in range(count))
    return sum(plays) / count


def _play(
    space: Space, steps_per_epoch: int, pace: Pace, num_devices: int, stops: bool, generator: random.Random
) -> float:
    later = deque(_trials(space, steps_per_epoch, stops, generator))
    rounds = space.scheduler if isinstance(space.scheduler, Rounds) and stops else None
    group = rounds.trials * num_devices if rounds else len(later)
    seconds, due = (
        0.0,
        0,
    )  # trials of the present round that are yet to come to its comparison or to their ends
    waiting, running, paused = deque[_Trial](), list[_Trial](), list[_Trial]()
    while later or waiting or running or paused:
        if due == 0:
            kept = sorted(paused, key=lambda trial: trial.quality)[
                : rounds.kept * num_devices if rounds else 0
            ]
            paused.clear()
            waiting.extendleft(reversed(kept))
            due = min(group, len(later))
            waiting.extend(later.popleft() for _ in range(due))
        while waiting and len(running) < pace.seats * num_devices:
            running.append(waiting.popleft())
        if not running:
            continue
        hop = min(trial.points[0] - trial.done for trial in running)
        in_company = max(1.0, len(running) / num_devices)
        seconds += hop * (pace.step_seconds + pace.trial_seconds * in_company)
        for trial in list(running):
            trial.done += hop
            if trial.points[0] - trial.done > _NEARLY:
                continue
            point = trial.points.popleft()
            seconds += pace.evaluation_seconds / num_devices
            rung = trial.rungs.get(point)
            value = trial.quality - _OF_STEPS * math.log2(point)
            has_ended = not trial.points or (rung is not None and not rung.lets_through(value))
            pauses = trial.may_pause and not has_ended and rounds is not None and point == rounds.steps
            if has_ended or pauses:
                running.remove(trial)
                due -= trial.may_pause
                trial.may_pause = False
            if pauses:
                paused.append(trial)
    return seconds


def _trials(space: Space, steps_per_epoch: int, stops: bool, generator: random.Random) -> Iterator[_Trial]:
    """Draw the trials of a play."""
    scheduler = space.scheduler
    asha = scheduler if isinstance(scheduler, Asha) else None
    shared = [Rung(asha.reduction_factor) for _ in asha.rungs] if asha else []
    for epochs in _drawn_epochs(space, generator):
        total = float(steps_per_epoch * epochs)
        unit = total / 100 if asha and asha.time_attr == "schedule_percent" else 1.0
        end = min(total, unit * asha.max_t) if asha else total
        rungs = dict(zip((unit * rung for rung in asha.rungs), shared, strict=True)) if asha else {}
        compared = [float(scheduler.steps)] if isinstance(scheduler, Rounds) else [*rungs]
        measured = {*(float(steps_per_epoch * epoch) for epoch in range(1, epochs + 1)), *compared, end}
        points = deque(sorted(point for point in measured if point <= end))
        yield _Trial(generator.random(), points, rungs if stops else {}, may_pause=True)


def _drawn_epochs(space: Space, generator: random.Random) -> Iterator[int]:
    """Draw the epochs of each trial, as the space's searcher does before it has learned anything."""
    epochs = [sum(space.trial_settings({"epochs": value}).stages) for value in space.values("epochs")]
    is_prior = space.searcher.type == "prior"
    if is_prior and isinstance(space.scheduler, NoEarlyStopping):
        yield from (epochs[number % len(epochs)] for number in range(space.num_trials))
    else:
        weights = [count**EPOCHS_POWER if is_prior else 1.0 for count in epochs]
        yield from generator.choices(epochs, weights, k=space.num_trials)
