"""Sweeps that are played: trials in company, who is stopped, and what a schedule alone takes."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.schedulers.async_hyperband import _Bracket

from tuning.plan_play import Pace, Rung, played_seconds
from tuning.space import Space

PACE = Pace(step_seconds=1.0, trial_seconds=0.5, evaluation_seconds=0.0, seats=4)


def space(epochs: list, num_trials: int = 8, **changes) -> Space:
    return Space.model_validate(
        {
            "data": {"train": "t", "public": "p"},
            "trial": {"batch_size": 1},
            "search": {"epochs": {"choice": epochs}},
            "num_samples": num_trials,
            "scheduler": {"type": "fifo"},
            **changes,
        }
    )


def test_rungs_let_through_whom_ray_tunes_asha_lets_through():
    generator, rung = random.Random(0), Rung(4)
    bracket = _Bracket(1, 100, 4, 0, stop_last_trials=True)
    for number in range(200):
        value = generator.random()
        decision = bracket.on_result(SimpleNamespace(trial_id=str(number)), 1, -value)
        assert rung.lets_through(value) == (decision != TrialScheduler.STOP)


@pytest.mark.parametrize(("num_trials", "seconds"), [(4, 10 * 3), (8, 20 * 3), (5, 10 * 3 + 10 * 1.5)])
def test_trials_in_company_share_steps(num_trials, seconds):
    assert played_seconds(space([1], num_trials), 10, PACE, 1) == pytest.approx(seconds)


def test_devices_share_the_trials():
    assert played_seconds(space([1]), 10, PACE, 2) == pytest.approx(10 * 3)
    assert played_seconds(space([1], 2), 10, PACE, 4) == pytest.approx(10 * 1.5)  # none has less than one


@pytest.mark.parametrize(
    ("changes", "count"), [({}, 3), ({"trial": {"batch_size": 1, "evaluations_per_epoch": 2}}, 6)]
)
def test_each_evaluation_takes_its_time(changes, count):
    slow = Pace(0.0, 0.0, 2.0, seats=1)
    assert played_seconds(space(["1+2"], 4, **changes), 10, slow, 1) == pytest.approx(4 * count * 2)
    assert played_seconds(space(["1+2"], 4, **changes), 10, slow, 2) == pytest.approx(2 * count * 2)


def test_a_trial_takes_its_time_to_start_and_trains_on_while_it_reports():
    """One that has trained to its next evaluation by then waits for its report; others don't."""
    starts = Pace(0.0, 1.0, 0.0, seats=1, start_seconds=3.0)
    assert played_seconds(space([1], 4), 10, starts, 1) == pytest.approx(4 * (3 + 10))
    assert played_seconds(space([1], 4), 10, replace(starts, seats=4), 1) == pytest.approx(3 + 40)
    of_two = {"trial": {"batch_size": 1, "evaluations_per_epoch": 2}}
    for report, seconds in ((5.0, 10), (8.0, 5 + 8)):
        reports = Pace(0.0, 1.0, 0.0, seats=1, report_seconds=report)
        assert played_seconds(space([1], 4, **of_two), 10, reports, 1) == pytest.approx(4 * seconds)


def test_a_trial_that_comes_later_joins_those_that_train():
    """Trials of 10, 20, 10 and 20 steps: the third is there at 18, and done at 28 as the fourth comes."""
    joins = Pace(1.0, 0.0, 0.0, seats=2, start_seconds=4.0)
    turns = {"search": {"epochs": {"grid_search": [1, 2]}}}
    found = played_seconds(space([1], 2, **turns), 10, joins, 1)
    assert found == pytest.approx(28 + 20)


def test_rungs_that_are_one_step_are_measured_once():
    slow, asha = Pace(0.0, 0.0, 2.0, seats=1), {"type": "asha", "grace_period": 6.25, "reduction_factor": 4}
    few = space([1], 3, scheduler=asha)  # of four steps: rungs at a quarter of one, and at one
    assert played_seconds(few, 4, slow, 1, stops=False) == pytest.approx(3 * 2 * 2)


ROUNDS = {"type": "rounds", "trials": 4, "kept": 1, "steps": 4}


def test_of_a_round_the_best_go_on_and_the_next_begins_behind_them():
    alone, together = Pace(0.0, 1.0, 0.0, seats=1), Pace(1.0, 0.0, 0.0, seats=8)
    rounds = space([1], 8, scheduler=ROUNDS)
    assert played_seconds(rounds, 10, alone, 1) == pytest.approx(8 * 4 + 2 * 6)
    assert played_seconds(rounds, 10, together, 1) == pytest.approx(2 * (4 + 6))
    assert played_seconds(rounds, 10, alone, 1, stops=False) == pytest.approx(80)
    assert played_seconds(rounds, 10, alone, 2) == pytest.approx(4 * 4 + 6)
    assert played_seconds(space([1], 4, scheduler=ROUNDS), 10, alone, 2) == pytest.approx(2 * 4 + 6)
    small = space([1], 2, scheduler={**ROUNDS, "kept": 2})  # than a round
    assert played_seconds(small, 10, alone, 1) == pytest.approx(2 * 10)
    measured = Pace(0.0, 0.0, 2.0, seats=1)
    assert played_seconds(rounds, 10, measured, 1) == pytest.approx((8 + 2) * 2)


def test_trials_that_are_whole_before_their_round_is_compared_take_part_in_it():
    alone = Pace(0.0, 1.0, 0.0, seats=1)
    long = space([1], 6, scheduler={**ROUNDS, "steps": 40})
    assert played_seconds(long, 10, alone, 1) == pytest.approx(60)
    mixed = space(["1", "8"], 400, scheduler={**ROUNDS, "trials": 2, "steps": 20})
    whole_first = played_seconds(mixed, 10, alone, 1)
    assert 200 * (10 + 20) < whole_first < 200 * (10 + 80)


def test_asha_saves_work_but_a_long_schedule_still_takes_its_time():
    asha = {"type": "asha", "grace_period": 10, "reduction_factor": 4}
    without = played_seconds(space([1, 8], 16), 10, PACE, 1)
    found = played_seconds(space([1, 8], 16, scheduler=asha), 10, PACE, 1)
    work = found / (1.0 / PACE.seats + 0.5)  # were all steps made in full company
    assert 80 * 1.5 < found < 0.6 * without
    assert work > 80  # steps: more than those of one long trial
    by_step = {**asha, "time_attr": "step", "max_t": 40, "grace_period": 5}
    assert played_seconds(space([8], 1, scheduler=by_step), 10, PACE, 1) == pytest.approx(40 * 1.5)


def test_plays_are_the_same_every_time():
    one = space([1, "1+1", 8], 16, scheduler={"type": "asha", "reduction_factor": 3})
    assert played_seconds(one, 10, PACE, 1) == played_seconds(one, 10, PACE, 1)


def test_epochs_that_take_turns_are_played_in_turn():
    turns = space([1, 3], 8, searcher={"type": "prior"})
    alone = Pace(0.0, 1.0, 0.0, seats=1)
    assert played_seconds(turns, 10, alone, 1) == pytest.approx(4 * 10 + 4 * 30)


def test_a_range_of_epochs_is_played_as_it_is_drawn():
    alone = Pace(0.0, 1.0, 0.0, seats=1)
    plain = space([1], 200).model_dump(mode="json")
    ranged = {**plain, "search": {"epochs": {"lograndint": [1, 33]}}}
    found = played_seconds(Space.model_validate(ranged), 10, alone, 1) / 200
    assert 7 * 10 < found < 11 * 10  # the mean is 9; of 1 and 32 it is 16
    prior = {**ranged, "searcher": {"type": "prior"}}  # favours long ones
    assert played_seconds(Space.model_validate(prior), 10, alone, 1) / 200 > 1.5 * found
    grid = {**plain, "search": {"epochs": {"grid_search": [1, 8]}}, "num_samples": 1}
    assert played_seconds(Space.model_validate(grid), 10, alone, 1) == pytest.approx(90)
