"""Owns the settings of how a sweep searches: who draws configurations, who stops trials, what it may spend.

Refuses to know how they do it (tuning.ledger_search, tuning.prior_search, tuning.restored_scheduler,
tuning.round_scheduler).
"""

import itertools
import math
from typing import Literal, Self

from pydantic import Field, model_validator

from qlora.config import Number, Settings


class RandomSearch(Settings):
    """Ray Tune's own generator: independent samples, and every value of each grid_search."""

    type: Literal["random"] = "random"


class OptunaSearch(Settings):
    """Ray Tune's Optuna integration (the extra `optuna`): TPE over what has finished so far."""

    type: Literal["optuna"]


EPOCHS_POWER = 1.5  # longer schedules are drawn more often; trials that are stopped early pay for no length


class PriorSearch(Settings):
    """Draws around the settings that are expected to be good, then around the best so far.

    See tuning.prior_search.
    """

    type: Literal["prior"]


class Asha(Settings):
    """Ray Tune's ASHAScheduler on public perplexity.

    `time_attr` says what trials are compared by: `schedule_percent`, the share of a trial's own schedule that
    it has done, so that unequal epoch counts and decaying learning rates meet fairly; or `step`, optimizer
    steps.
    """

    type: Literal["asha"] = "asha"
    time_attr: Literal["schedule_percent", "step"] = "schedule_percent"
    max_t: Number = Field(100, gt=0)
    grace_period: Number = Field(25, gt=0)
    reduction_factor: Number = Field(2, gt=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.time_attr == "schedule_percent" and self.max_t > 100:
            raise ValueError(f"max_t is {self.max_t:g} percent of the schedule; it can't be above 100")
        if self.grace_period >= self.max_t:
            raise ValueError(
                f"grace_period {self.grace_period:g} must be below max_t {self.max_t:g}, "
                "or nothing is ever compared"
            )
        return self

    @property
    def rungs(self) -> list[float]:
        """Return the points below max_t where trials are compared, in units of time_attr."""
        points = (self.grace_period * self.reduction_factor**power for power in itertools.count())
        return list(itertools.takewhile(lambda point: point < self.max_t, points))


class Rounds(Settings):
    """Rounds of trials that are compared once, early and at the same step; the best of each train on.

    Each of a round's `trials` is paused after `steps` optimizer steps; once all are there, `kept` of them go
    on to their ends and the others are stopped. So many rounds are under way at once as there are devices.
    """

    type: Literal["rounds"]
    trials: int = Field(8, ge=2)
    kept: int = Field(2, ge=1)
    steps: int = Field(12, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kept >= self.trials:
            raise ValueError(f"kept {self.kept} must be below trials {self.trials}, or none is stopped")
        return self

    def survivors(self, num_trials: int) -> int:
        """Count the trials of a sweep that go on behind the comparison; the last round may be short."""
        whole, rest = divmod(num_trials, self.trials)
        return whole * self.kept + min(rest, self.kept)


class NoEarlyStopping(Settings):
    """Ray Tune's FIFOScheduler: every trial runs its whole schedule."""

    type: Literal["fifo"]


class Budget(Settings):
    """Names what the trials of a sweep may spend, whichever is spent first.

    The sweep then ends with what it has. minutes: while trials run. gpu_seconds: of all GPUs that have one.
    """

    minutes: Number | None = Field(None, gt=0)
    gpu_seconds: Number | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _is_given(self) -> Self:
        if self.minutes is None and self.gpu_seconds is None:
            raise ValueError("give minutes or gpu_seconds")
        return self

    @property
    def words(self) -> str:
        """Write it as people read it."""
        parts = [f"{self.minutes:g} minutes"] if self.minutes is not None else []
        parts += [f"{self.gpu_seconds:g} GPU-seconds"] if self.gpu_seconds is not None else []
        return " or ".join(parts)

    def seconds(self, num_devices: int) -> float:
        """Return the seconds until it is spent, on so many devices."""
        of_minutes = math.inf if self.minutes is None else 60 * self.minutes
        return min(of_minutes, math.inf if self.gpu_seconds is None else self.gpu_seconds / num_devices)
