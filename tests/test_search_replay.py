"""Sweeps played against rows of known curves: who answers a proposal, what it costs, what is best."""

import math

import pytest
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher

from benchmarks import search
from benchmarks.search_table import make
from benchmarks.search_table.regret import draw, summary, worst_ratio
from benchmarks.search_table.replay import Costs, Played, play
from benchmarks.search_table.table import Point, Row, read_table
from tuning.objective import METRIC
from tuning.round_scheduler import RoundScheduler
from tuning.strategy import Asha, Rounds

COSTS = Costs(step=1.0, step_of_trial=0.5, evaluation=10.0)
RUNGS = Asha(grace_period=50, reduction_factor=2)
CONFIG = {
    "learning_rate": 1e-3,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "schedule": "linear",
    "epochs": 1,
}


def row(number: int, *perplexities: float, **config) -> Row:
    """A row of 100 steps an epoch whose curve has these perplexities at equal distances."""
    step = 100 // len(perplexities)
    points = tuple(Point(step * (n + 1), 1.0, value, 0.0, 0.0) for n, value in enumerate(perplexities))
    return Row(number, 0, {**CONFIG, **config}, points, (), 0, "")


class Listed(Searcher):
    """A searcher that proposes what it was given, and keeps what it is told."""

    def __init__(self, *configs: dict):
        super().__init__(METRIC, "min")
        self.configs, self.told = list(configs), []

    def suggest(self, trial_id: str):
        return {**CONFIG, **self.configs.pop(0)} if self.configs else None

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        self.told.append((trial_id, result["step"], result[METRIC]))

    def on_trial_complete(self, trial_id: str, result=None, error: bool = False) -> None:
        self.told.append((trial_id, "ended", result[METRIC] if result else None))


def test_a_trial_alone_costs_its_steps_and_evaluations():
    searcher = Listed({})
    played = play([row(0, 9.0, 4.0)], COSTS, searcher, FIFOScheduler(), RUNGS, together=4)
    assert [(who, step) for who, step, _ in searcher.told] == [
        ("0_00000", step) for step in (50, 100, "ended")
    ]
    assert played.seconds == (50 * 1.5 + 10, 100 * 1.5 + 20) and played.best == pytest.approx((9.0, 4.0))
    assert played.ended == played.seconds[-1]
    assert played.best_at(84) == math.inf and played.best_at(85) == pytest.approx(9.0)
    assert played.seconds_to(5.0) == 170 and played.seconds_to(3.0) == math.inf


def test_trials_together_share_what_a_step_costs():
    rows = [row(0, 9.0, 4.0), row(1, 8.0, 3.0)]
    played = play(rows, COSTS, Listed({}, {}), FIFOScheduler(), RUNGS, together=2)
    assert played.ended == 100 * (1.0 + 2 * 0.5) + 4 * 10
    one_by_one = play(rows, COSTS, Listed({}, {}), FIFOScheduler(), RUNGS, together=1)
    assert one_by_one.ended == 2 * (100 * 1.5 + 2 * 10)


def test_a_proposal_is_answered_by_the_nearest_row_that_is_not_used():
    rows = [row(0, 5.0, learning_rate=1e-4), row(1, 6.0, learning_rate=1e-3), row(2, 7.0, learning_rate=2e-3)]
    searcher = Listed({"learning_rate": 1e-3}, {"learning_rate": 1e-3}, {"learning_rate": 1e-3}, {})
    play(rows, COSTS, searcher, FIFOScheduler(), RUNGS, together=1)
    ends = [perplexity for _, step, perplexity in searcher.told if step == "ended"]
    assert ends == pytest.approx([6.0, 7.0, 5.0])


def test_a_stopped_trial_gives_its_place_to_another():
    rows = [row(0, 5.0, 4.0), row(1, 9.0, 3.0), row(2, 4.0, 2.0)]
    configs = [{"learning_rate": rate} for rate in (1e-3, 1e-3, 1e-3)]
    scheduler = ASHAScheduler(time_attr="schedule_percent", max_t=100, grace_period=50, reduction_factor=2)
    searcher = Listed(*configs)
    played = play(rows, COSTS, searcher, scheduler, RUNGS, together=1)
    assert ("0_00001", "ended", pytest.approx(9.0)) in searcher.told  # worse than the first one at its rung
    assert played.best[-1] == pytest.approx(2.0)
    assert played.ended == (100 + 50 + 100) * 1.5 + 5 * 10


def test_the_tables_steps_cost_more_with_more_trials():
    costs = Costs.of(read_table())
    assert 0 < costs.step < 0.1 and 0.005 < costs.step_of_trial < 0.05 and 0.01 < costs.evaluation < 1


def test_both_halves_of_the_table_fill_the_ranges():
    halves = [{row.number: row for row in search.rows_of(half)} for half in ("design", "judged")]
    assert not halves[0].keys() & halves[1].keys()
    for half in halves:
        for key, choices in {"lora_r": make.RANKS, "lora_alpha": make.ALPHAS, "epochs": make.EPOCHS}.items():
            counts = [sum(row.config[key] == choice for row in half.values()) for choice in choices]
            assert min(counts) >= 5, (key, counts)


def test_paused_trials_go_on_where_they_stood_and_new_rounds_wait_for_them():
    """Two rounds of two: the better one of each, after 50 steps, trains on."""
    rounds = Rounds(type="rounds", trials=2, kept=1, steps=50)
    rows = [row(n, first, last) for n, (first, last) in enumerate([(5, 4), (9, 3), (4, 2), (8, 1)])]
    searcher, scheduler = Listed({}, {}, {}, {}), RoundScheduler(rounds, [], num_trials=4, num_devices=1)
    played = play(
        rows, COSTS, searcher, scheduler, rounds, together=4, may_begin=scheduler.may_begin, enough=0.5
    )
    assert [(who, step) for who, step, _ in searcher.told if step != "ended"] == [
        ("0_00000", 50), ("0_00001", 50), ("0_00000", 100),
        ("0_00002", 50), ("0_00003", 50), ("0_00002", 100),
    ]  # fmt: skip
    assert played.best[-1] == pytest.approx(2.0)
    assert played.ended == 2 * (50 * 2.0 + 50 * 1.5 + 3 * 10)


def test_regret_is_told_and_drawn(tmp_path):
    quick = [Played((10.0, 20.0), (6.0, 5.0), 20.0)] * 3
    slow = [Played((10.0, 80.0), (6.0, 5.0), 80.0)] * 2 + [Played((10.0,), (5.5,), 90.0)]
    told = summary(slow, best=5.0)
    assert told["reached"] == pytest.approx(2 / 3) and told["median_seconds"] == 80.0
    assert told["median_regret_at_60"] == round(math.log(6 / 5), 4)
    assert worst_ratio(quick, slow, best=5.0)[0] == pytest.approx(1.0, abs=0.01)  # up to the second result
    assert worst_ratio(slow, quick, best=5.0)[0] > 50
    draw({"quick": quick, "slow": slow}, 5.0, tmp_path / "regret.png")
    assert (tmp_path / "regret.png").stat().st_size > 10_000
