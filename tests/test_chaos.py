"""A few of the kills that `make chaos` enumerates, drawn by a seed."""

import os

import chaos
import pytest

pytestmark = pytest.mark.ray
SEED = int(os.environ.get("CHAOS_SEED", "0"))


@pytest.mark.parametrize(
    ("name", "count"), [pytest.param("tune", 3, marks=pytest.mark.slow), ("batch_infer", 1)]
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


def test_kills_follow_each_other_in_the_order_of_their_places():
    order = [(1, f"{name} {place} 1") for name in "abcdef" for place in ("before", "after")]
    order[6:6] = [(2, "host before 1"), (2, "host after 1"), (1, "a before 2"), (1, "a after 2")]
    cases = [chaos.Case.at("tune", place) for _, place in order]
    chains = chaos.chains_of(cases, order)
    assert sorted(case.order for chain in chains for case in chain) == sorted(place for _, place in order)
    places = [place for _, place in order]
    for chain in chains:
        assert len(chain) <= 4
        found = [places.index(case.order) for case in chain]
        assert found == sorted(found)
        assert all(case.occurrence == 1 and case.point != "host" for case in chain[1:])
    assert [case.order for case in cases if case.point == "host"] == [
        chain[0].order for chain in chains if chain[0].point == "host" and len(chain) == 1
    ]
