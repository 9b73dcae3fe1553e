"""A few of the kills that `make chaos` enumerates, drawn by a seed."""

import os

import chaos
import pytest

pytestmark = pytest.mark.ray
SEED = int(os.environ.get("CHAOS_SEED", "0"))


@pytest.mark.parametrize(
    ("name", "count"), [pytest.param("tune", 2, marks=pytest.mark.slow), ("batch_infer", 1)]
)
def test_a_kill_at_a_durable_write_changes_nothing(tmp_path, name, count):
    (scenario,) = (one for one in chaos.SCENARIOS if one.name == name)
    results = list(chaos.run_scenario(scenario, tmp_path, count, SEED, print))
    assert len(results) == count
    assert [chaos.line_of(result) for result in results if result.problem] == []


def test_an_outcome_that_differs_is_told_with_its_place():
    assert chaos.difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) == ""
    assert chaos.difference({"a": {"b": 2}}, {"a": {"b": 3}}) == "/a/b: 3 is not 2"
    assert chaos.difference({"a": 1}, {}) == "/a: None is not 1"


def test_one_kill_stands_for_after_a_write_and_before_the_next_one_of_the_same_process():
    alone = [(1, "a before 1"), (1, "a after 1"), (1, "b before 1"), (1, "b after 1")]
    assert chaos.same_moments(alone) == {"a after 1": "b before 1"}
    with_another = [*alone[:2], (2, "c before 1"), *alone[2:], (2, "c after 1"), (1, "a before 2")]
    assert chaos.same_moments(with_another) == {}
