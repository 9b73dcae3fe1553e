"""Owns the playing of a sweep: how long its trials take together, before any of them is there.

Trials take seats, train in company and are measured; chance says how good they are, and so who is stopped.
What makes sweeps long, schedules that are left to train alone, is in no sum of their work. One device is
played, with its part of the trials.
"""

import bisect
import math
import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from qlora.config import TrialSettings
from qlora.training import make_timetable
from tuning.evaluation_steps import evaluation_steps
from tuning.samplers import drawn_values
from tuning.space import Space
from tuning.strategy import EPOCHS_POWER, Asha, NoEarlyStopping, Rounds

_PLAYS, _MANY_TRIALS = 24, 200  # of more trials, luck evens out in one play
_DRAWS = 256  # of a space's epochs, which tell how often each is drawn
_OF_STEPS = 0.3  # of all differences in quality: what twice the steps bring, at one share of schedules


@dataclass(frozen=True)
class Pace:
    """The seconds that a device takes for a step of its trials, itself and each trial in it.

    evaluation_seconds: to measure one trial. seats: trials side by side. start_seconds: from a free seat to a
    new trial's first step. report_seconds: to write a report and hand it on; its trial trains on meanwhile,
    and is not measured again before that is done.
    """

    step_seconds: float
    trial_seconds: float
    evaluation_seconds: float
    seats: int
    start_seconds: float = 0.0
    report_seconds: float = 0.0


@dataclass(frozen=True)
class _Schedule:
    """The steps at which a trial is measured, ascending, the last its end; those of ASHA's rungs."""

    points: tuple[int, ...]
    rungs: tuple[int, ...]


@dataclass
class _Trial:
    """A trial that is played.

    quality: less is better, at any time. points: steps at which it is yet to be measured, the last its end.
    rungs: those of them at which it is compared. ready: when it has started, or may be measured. reported:
    when its last report is done.
    """

    quality: float
    points: deque[int]
    rungs: Mapping[int, "Rung"]
    done: int = 0
    ready: float = 0.0
    reported: float = 0.0


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
    space: Space, num_examples: int, pace: Pace, num_devices: int = 1, *, stops: bool = True
) -> float:
    """Return the mean seconds of some plays of a sweep's trials, the same in every call.

    `num_examples`: for training. `stops`: weak trials are stopped, as the space's scheduler does it, and not
    only compared.
    """
    generator, num_trials = random.Random(0), math.ceil(space.num_trials / num_devices)
    values, weights = _possible_epochs(space)
    schedules = {value: _schedule(space, value, num_examples) for value in values}
    plays = _PLAYS if num_trials <= _MANY_TRIALS else 1
    rounds = space.scheduler if isinstance(space.scheduler, Rounds) and stops else None
    seconds = 0.0
    for _ in range(plays):
        drawn = [schedules[value] for value in _drawn(values, weights, num_trials, generator)]
        trials = _trials(space, drawn, stops, generator)
        if rounds is None:
            seconds += _play(trials, pace)
        else:
            size = min(rounds.trials, num_trials)  # on this device, as all of its rounds but the last
            of_all = min(rounds.trials, space.num_trials)
            kept = math.ceil(rounds.survivors(of_all) * size / of_all)
            groups = (trials[start : start + size] for start in range(0, num_trials, size))
            seconds += sum(_play(group, pace, rounds.steps, kept) for group in groups)
    return seconds / plays


def _play(trials: Sequence[_Trial], pace: Pace, pause_at: int = 0, num_kept: int = 0) -> float:
    """Return the seconds of trials; with `pause_at`, all wait there for each other, and some are kept."""
    seconds, waiting, running = 0.0, deque(trials), list[_Trial]()
    paused = list[_Trial]()
    while waiting or running or paused:
        if not waiting and not running:
            best = sorted(trials, key=lambda trial: trial.quality)[:num_kept]
            waiting.extend(trial for trial in best if trial.points)
            paused.clear()
        while waiting and len(running) < pace.seats:
            running.append(waiting.popleft())
            running[-1].ready = seconds + pace.start_seconds
        if not running:
            break
        there = [trial for trial in running if trial.ready <= seconds]
        if not there:
            seconds = min(trial.ready for trial in running)
            continue
        step_seconds = pace.step_seconds + pace.trial_seconds * len(there)
        hop = min(trial.points[0] - trial.done for trial in there)
        if coming := [trial.ready - seconds for trial in running if trial.ready > seconds]:
            hop = min(hop, math.ceil(min(coming) / max(step_seconds, 1e-9)))
        seconds += hop * step_seconds
        for trial in there:
            trial.done += hop
            if trial.done < trial.points[0]:
                continue
            if trial.reported > seconds:
                trial.ready = trial.reported
                continue
            trial.points.popleft()
            seconds += pace.evaluation_seconds
            trial.reported = seconds + pace.report_seconds
            rung = trial.rungs.get(trial.done)
            value = trial.quality - _OF_STEPS * math.log2(trial.done)
            if rung is not None and not rung.lets_through(value):
                trial.points.clear()
            if not trial.points:
                running.remove(trial)
            elif trial.done == pause_at:
                running.remove(trial)
                paused.append(trial)
    return seconds


def _trials(
    space: Space, schedules: Sequence[_Schedule], stops: bool, generator: random.Random
) -> list[_Trial]:
    asha = space.scheduler if isinstance(space.scheduler, Asha) and stops else None
    shared = [Rung(asha.reduction_factor) for _ in asha.rungs] if asha else []
    return [
        _Trial(
            generator.random(),
            deque(schedule.points),
            dict(zip(schedule.rungs, shared, strict=True)) if asha else {},
        )
        for schedule in schedules
    ]


def _schedule(space: Space, epochs: Any, num_examples: int) -> _Schedule:
    """Return when a trial of so many epochs is measured and compared."""
    settings = _settings(space, epochs)
    timetable, scheduler = make_timetable(num_examples, settings), space.scheduler
    measured = evaluation_steps(timetable, scheduler, settings.evaluations_per_epoch) | {
        timetable.total_steps
    }
    if not isinstance(scheduler, Asha):
        return _Schedule(tuple(sorted(measured)), ())
    is_share = scheduler.time_attr == "schedule_percent"
    unit = Fraction(timetable.total_steps, 100) if is_share else Fraction(1)
    end = math.ceil(Fraction(scheduler.max_t) * unit)
    points = tuple(point for point in sorted(measured) if point <= end)
    return _Schedule(points, tuple(math.ceil(Fraction(rung) * unit) for rung in scheduler.rungs))


def _settings(space: Space, epochs: Any) -> TrialSettings:
    """Return a trial's settings with the largest batch that is searched, if one is."""
    batch = {"batch_size": int(max(space.values("batch_size")))} if "batch_size" in space.search else {}
    return space.trial_settings({"epochs": epochs, **batch})


def _possible_epochs(space: Space) -> tuple[list[Any], list[float] | None]:
    """Return values of epochs, and how often each is drawn; None if they take turns."""
    sampler, is_prior = space.search.get("epochs", {}), space.searcher.type == "prior"
    takes_turns = is_prior and isinstance(space.scheduler, NoEarlyStopping)  # see tuning.prior_search
    if not sampler or "grid_search" in sampler or (takes_turns and "choice" in sampler):
        return list(space.values("epochs")), None
    counts = Counter(drawn_values(space.search, "epochs", _DRAWS))
    power = EPOCHS_POWER if is_prior else 0.0
    lengths = {value: sum(_settings(space, value).stages) for value in counts}
    return list(counts), [count * lengths[value] ** power for value, count in counts.items()]


def _drawn(
    values: Sequence[Any], weights: Sequence[float] | None, num_trials: int, generator: random.Random
) -> list[Any]:
    """Draw the epochs of trials, as a searcher does before it has learned anything."""
    if weights is None:
        return [values[number % len(values)] for number in range(num_trials)]
    return generator.choices(values, weights, k=num_trials)
