"""Owns when a trial is evaluated: at the scheduler's rungs, and along every epoch."""

import math
from fractions import Fraction

from qlora.training import Timetable
from tuning.strategy import Asha, NoEarlyStopping, Rounds


def evaluation_steps(
    timetable: Timetable, scheduler: Asha | Rounds | NoEarlyStopping, evaluations_per_epoch: int
) -> set[int]:
    """Return the steps after which a trial is evaluated, each rung being reached exactly."""
    per_epoch = timetable.steps_per_epoch
    parts = {
        math.ceil(part * per_epoch / evaluations_per_epoch) for part in range(1, evaluations_per_epoch + 1)
    }
    steps = {epoch * per_epoch + part for epoch in range(sum(timetable.stages)) for part in parts}
    if isinstance(scheduler, Asha):
        of_percent = scheduler.time_attr == "schedule_percent"
        scale = Fraction(timetable.total_steps, 100) if of_percent else Fraction(1)
        steps |= {math.ceil(Fraction(point) * scale) for point in (*scheduler.rungs, scheduler.max_t)}
    if isinstance(scheduler, Rounds):
        steps.add(scheduler.steps)
    return {step for step in steps if 1 <= step <= timetable.total_steps}
