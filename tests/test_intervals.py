"""The best of many looks better than it is; what a report expects on unseen examples holds."""

import numpy as np
import pytest

from benchmarks.search_table.coverage import coverage
from reporting.intervals import expect_unseen
from reporting.verdicts import AverageReport, HoldoutReport, TrialReport, outlook


def test_the_interval_for_unseen_examples_covers_on_replays():
    """Sweeps of the search table, whose trials' perplexities on all examples are known."""
    held = coverage(16, 60, replays=500)
    assert 0.90 <= held["ours"] <= 0.97
    assert held["plain"] < held["ours"], "the plain interval forgets the choice and the skew"


def test_the_best_of_many_that_are_equal_is_put_right():
    """Trials that differ by chance alone: the best one's mean is too low, and the expectation is not."""
    generator, found, naive = np.random.default_rng(0), [], []
    for _ in range(40):
        values = 5 + generator.gamma(2, 1, (20, 50))
        best = int(values.mean(axis=1).argmin())
        found.append(expect_unseen(values.tolist(), best, 1000).mean)
        naive.append(values[best].mean())
    assert np.mean(naive) < 6.75
    assert abs(np.mean(found) - 7) < abs(np.mean(naive) - 7) / 2


@pytest.mark.parametrize("factors", [(1.0,), (1.0, 2.0)])
def test_where_there_was_no_choice_nothing_is_put_right(factors):
    """One trial, or one that is best on every draw, has the mean that it has, however few its examples."""
    values = np.random.default_rng(5).lognormal(1, 1, 16)
    found = expect_unseen([(factor * values).tolist() for factor in factors], 0)
    assert found.mean == pytest.approx(values.mean())
    assert np.isfinite([found.low, found.high]).all()
    odd = expect_unseen([[3.0, 3.0, 9.0]], 0)
    assert np.isfinite([odd.low, odd.high]).all()


def test_one_trial_alone_and_examples_that_are_alike_need_no_putting_right():
    values = np.random.default_rng(1).lognormal(2, 0.3, 100)
    alone = expect_unseen([values.tolist()], 0)
    assert alone.mean == pytest.approx(values.mean())
    assert alone.low < alone.mean < alone.high
    same = expect_unseen([[3.0] * 5, [4.0] * 5], 0)
    assert (same.mean, same.low, same.high) == pytest.approx((3, 3, 3))


def trial(name: str, values) -> TrialReport:
    curve = [(100.0, float(np.mean(values)))]
    return TrialReport(name, {"lora_r": 8}, "finished", "", curve, list(values), 1.0, 1.0, 0.0, 1.0)


def test_a_report_says_what_to_expect():
    values = np.random.default_rng(2).lognormal(2, 0.5, 60)
    trials = [trial("a", values), trial("b", values[::-1] * 1.01)]
    words = outlook(trials)
    assert words.startswith("On unseen examples of the same kind expect ")
    assert "than it is." in words
    average = AverageReport(("a", "b"), (values * 0.9).tolist())
    assert outlook(trials, average) != words
    assert outlook([trial("one", [3.0])]) == ""


@pytest.mark.parametrize(
    ("factor", "told"),
    [(0.8, "it is better than"), (1.2, "it is worse than"), (1.0, "it can't be told from")],
)
def test_a_holdout_is_what_counts_where_there_is_one(factor, told):
    values = np.random.default_rng(3).lognormal(2, 0.5, 60)
    held = HoldoutReport("60 examples, instruction + output", values * factor, "b", values)
    words = outlook([trial("a", values)], None, held)
    assert words.startswith("On the holdout (60 examples, instruction + output), on which nothing was chosen")
    assert told in words
    assert "trial b" in words
    assert "trial" not in outlook([trial("a", values)], None, HoldoutReport("60", values, "", ()))
