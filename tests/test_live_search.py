"""The second task of the search's live proof, and the figures that are read of its sweeps."""

import json

from benchmarks.arithmetic import make_rows, write_task
from benchmarks.live_search import WAYS, Budget, Sweep, figures
from qlora.data.examples import load_examples
from ray_jobs.cli import folder_name
from tuning.space import load_space


def test_each_step_of_an_answer_is_right_and_no_question_stands_twice(tmp_path):
    paths = write_task(tmp_path, seed=3)
    rows = {name: load_examples(str(path), need_output=True) for name, path in paths.items()}
    assert {name: len(found) for name, found in rows.items()} == {"train": 2000, "public": 250, "unseen": 500}
    asked = [one.instruction for found in rows.values() for one in found]
    assert len(set(asked)) == len(asked)
    for one in rows["public"]:
        first, second = (step.split(" = ") for step in one.output.split("; "))
        for sum_, result in (first, second):
            assert eval(sum_.replace("x", "*"), {"__builtins__": {}}) == int(result) > 0
        assert first[1] in second[0].split()


def test_rows_are_drawn_by_their_seed():
    assert make_rows(20, 1) == make_rows(20, 1) != make_rows(20, 2)


def test_every_way_is_a_sound_space(tmp_path):
    spaces = {
        way: load_space(
            "search_spaces/wide.yaml", Sweep(way, 1, Budget.of("52.5:3:1+1,1+1+3"), tmp_path).changes
        )
        for way in WAYS
    }
    assert {way: space.num_trials for way, space in spaces.items()} == {"asha": 16, "prior": 16, "stages": 3}
    assert {space.budget.gpu_seconds for space in spaces.values()} == {52.5}
    assert spaces["stages"].values("epochs") == ["1+1", "1+1+3"]
    kinds = {way: (space.searcher.type, space.scheduler.type) for way, space in spaces.items()}
    assert kinds == {"asha": ("random", "asha"), "prior": ("prior", "asha"), "stages": ("prior", "fifo")}


def test_a_sweep_has_a_name_that_commands_take_and_that_tells_stages_apart(tmp_path):
    words = ["105:6:1+1+1", "105:6:1+1+1,3", "105:6:3", "105:7:1+1+1", "52.5:6:1+1"]
    names = [Sweep("stages", 1, Budget.of(budget), tmp_path).name for budget in words]
    assert [folder_name(name) for name in names] == names
    assert len(set(names)) == len(names)


def test_figures_are_those_of_the_summary(tmp_path):
    sweep = Sweep("stages", 2, Budget(105, 7, ("1+1+1",)), tmp_path)
    assert (sweep.summary(), figures(sweep)) == (None, {})
    sweep.results.mkdir(parents=True)
    content = {
        "best": {"public_perplexity": 5.4, "members": [{"trial_id": "a"}, {"trial_id": "b"}]},
        "trials": [{"curve": [{"public_perplexity": 5.7}, {"public_perplexity": 5.6}]}, {"curve": []}],
        "holdout": {"perplexity": 5.5},
        "spent": {"gpu_seconds": 104.96},
    }
    (sweep.results / "summary.json").write_text(json.dumps(content))
    assert figures(sweep) == {
        "public": 5.4, "unseen": 5.5, "best_trial": 5.6, "members": 2, "gpu_seconds": 105.0,
    }  # fmt: skip
