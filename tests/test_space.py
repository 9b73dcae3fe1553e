"""Search spaces and what follows from them: shipped files, rungs, evaluation points, ASHA after a restore,
the ledger.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from qlora.config import InputError, TrialSettings, parse_stages
from qlora.training import Timetable
from tuning.evaluation_steps import evaluation_steps
from tuning.ledger import Ledger, TrialRecord, ranked, share_of_epochs_saved
from tuning.progress import what_stopping_saved
from tuning.restored_scheduler import RestoredScheduler
from tuning.samplers import SAMPLERS, sampled_values
from tuning.space import load_space, tune_space
from tuning.strategy import Asha, NoEarlyStopping
from workflows.sweep.folder import reopen_sweep

SPACES = sorted(Path("search_spaces").glob("*.yaml"))


def test_the_shipped_spaces_are_sound():
    assert {path.stem for path in SPACES} >= {"quickstart", "report", "wide"}
    spaces = {path.stem: load_space(path, []) for path in SPACES}
    assert all(set(tune_space(space)) == set(space.search) for space in spaces.values())
    assert spaces["quickstart"].num_trials >= 8
    for name in ("wide", "report"):
        space = spaces[name]
        assert (space.searcher.type, space.scheduler.type, space.num_trials) == ("prior", "fifo", 6)
    report = spaces["report"]
    assert (
        report.base_model.name
        == "yentinglin/Taiwan-LLM-7B-v2.0-chat@5073b2bbc1aa5519acdc865e99832857ef47f7c9"
    )
    assert report.data.train_examples == 3000
    longest = [parse_stages(epochs) for epochs in report.values("epochs")]
    for reported in ([1], [1, 1], [1, 1, 3]):  # what a stage ends with is a result of its own
        assert any(list(stages[: len(reported)]) == reported for stages in longest)


def test_samplers_are_ray_tunes_own():
    assert all(callable(getattr(tune, name)) for name in (*SAMPLERS, "choice", "grid_search"))


def test_overrides_reach_any_depth():
    space = load_space(
        "search_spaces/quickstart.yaml",
        ["num_samples=3", "scheduler.grace_period=10", "search.lora_r={choice: [2, 4]}"],
    )
    assert (space.num_samples, space.scheduler.grace_period, space.search["lora_r"]) == (
        3,
        10,
        {"choice": [2, 4]},
    )


def test_yaml_numbers_without_a_dot_are_numbers():
    assert (
        load_space("search_spaces/quickstart.yaml", ["trial.weight_decay=1e-2"])
        .trial_settings({})
        .weight_decay
        == 0.01
    )


def test_a_grid_multiplies_samples():
    assert (
        load_space(
            "search_spaces/quickstart.yaml", ["num_samples=2", "search.lora_r={grid_search: [2, 4, 8]}"]
        ).num_trials
        == 6
    )


def test_trials_are_evaluated_at_rungs_and_ends_of_epochs():
    asha = Asha(grace_period=25, reduction_factor=2)
    assert asha.rungs == [25, 50]
    assert evaluation_steps(Timetable(4, (1,)), asha, 1) == {1, 2, 4}
    assert evaluation_steps(Timetable(4, (1, 1)), asha, 1) == {2, 4, 8}
    assert evaluation_steps(Timetable(10, (1,)), asha, 2) == {3, 5, 10}
    assert evaluation_steps(Timetable(4, (2,)), Asha(time_attr="step", max_t=7, grace_period=3), 1) == {
        3,
        4,
        6,
        7,
        8,
    }
    assert evaluation_steps(Timetable(4, (2,)), NoEarlyStopping(type="fifo"), 1) == {4, 8}


@pytest.mark.parametrize("total", range(1, 40))
def test_an_evaluation_at_a_rung_counts_for_that_rung(total):
    """Rounding must not leave a report just below its rung, where ASHA would not see it."""
    timetable, asha = Timetable(total, (1,)), Asha(grace_period=6.25, reduction_factor=2)
    reports = [timetable.percent_at(step) for step in sorted(evaluation_steps(timetable, asha, 1))]
    assert reports[-1] == 100
    for rung in asha.rungs:
        first = min(percent for percent in reports if percent >= rung)
        assert first - rung <= 100 / total


def record(trial_id, *perplexities, epochs=4, status="finished"):
    others = {"training_loss": 1.0, "learning_rate": 1e-3, "tokens_per_second": 9.0, "peak_memory_gib": 0.0}
    curve = [
        {"step": n, "epoch": n, "schedule_percent": 100 * n / epochs, "public_perplexity": value, **others}
        for n, value in enumerate(perplexities, start=1)
    ]
    config = TrialSettings(epochs=epochs).model_dump(mode="json")
    return TrialRecord(trial_id, config, status, tuple(curve))


def test_a_restored_asha_decides_as_one_that_was_never_stopped(tmp_path):
    ledger = Ledger(tmp_path)
    for name, value in {"a": 10.0, "b": 20.0, "c": 30.0}.items():
        ledger.put(record(name, value, status="running"))
    options = {"max_t": 100, "grace_period": 25, "reduction_factor": 2, "mode": "min"}
    options |= {"time_attr": "schedule_percent", "metric": "public_perplexity"}
    asha = RestoredScheduler(ASHAScheduler(**options), list(Ledger(tmp_path).records.values()))
    for name in ("a", "b", "c", "new"):
        asha.on_trial_add(None, SimpleNamespace(trial_id=name))

    def decide(name, value):
        return asha.on_trial_result(
            None, SimpleNamespace(trial_id=name), {"schedule_percent": 25.0, "public_perplexity": value}
        )

    assert decide("new", 25.0) == "STOP"
    fresh = RestoredScheduler(ASHAScheduler(**options), [])
    fresh.on_trial_add(None, SimpleNamespace(trial_id="new"))
    assert (
        fresh.on_trial_result(
            None, SimpleNamespace(trial_id="new"), {"schedule_percent": 25.0, "public_perplexity": 25.0}
        )
        == "CONTINUE"
    )


def test_the_ledger_survives_reopening_and_repeated_points(tmp_path):
    ledger = Ledger(tmp_path)
    first = record("a", 9.0, 5.0, 7.0)
    ledger.put(first)
    ledger.put(record("b", 6.0))
    again = Ledger(tmp_path)
    assert list(again.records) == ["a", "b"]
    assert again.records["a"] == first
    assert first.best["public_perplexity"] == 5.0
    repeated = first.with_point({**first.curve[1], "public_perplexity": 4.0})
    assert [point["step"] for point in repeated.curve] == [1, 2]
    assert repeated.best["public_perplexity"] == 4.0


def test_the_best_point_ranks_a_trial_not_its_last():
    overfitted, steady, dead = (
        record("o", 9.0, 4.0, 8.0),
        record("s", 9.0, 7.0, 5.0),
        TrialRecord("d", {"epochs": 1}, "failed"),
    )
    assert [r.trial_id for r in ranked([dead, steady, overfitted])] == ["o", "s", "d"]


def test_epochs_saved_count_what_stopping_spared():
    records = [
        record("a", 1.0, 1.0, 1.0, 1.0),
        record("b", 1.0, status="stopped"),
        record("c", 1.0, status="failed"),
    ]
    assert share_of_epochs_saved(records) == pytest.approx(3 / 12)


def test_what_stopping_saved_is_told_where_it_ended_a_trial():
    whole, stopped = record("a", 1.0, 1.0, 1.0, 1.0), record("b", 1.0, status="stopped")
    assert what_stopping_saved([whole, whole]) == "2 trials"
    told = what_stopping_saved([whole, stopped])
    assert told == "early stopping ended 1 of 2 trials and saved 38% of the full-length epochs"


def test_numbers_given_as_text_are_numbers():
    space = load_space(
        "search_spaces/quickstart.yaml",
        [
            "search.lora_r={choice: ['4', '8']}",
            "trial.batch_size='2'",
            "search.epochs={choice: ['2', 1.0, '1+1']}",
        ],
    )
    assert space.search["lora_r"] == {"choice": [4, 8]}
    assert space.trial["batch_size"] == 2
    assert space.search["epochs"] == {"choice": [2, 1, "1+1"]}


def test_one_target_module_may_stand_alone():
    space = load_space("search_spaces/quickstart.yaml", ["trial.target_modules=q_proj"])
    assert space.trial_settings({}).target_modules == ("q_proj",)
    space = load_space("search_spaces/quickstart.yaml", ["trial.target_modules='q_proj, v_proj'"])
    assert space.trial_settings({}).target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize("key", ["lora_r", "lora_alpha", "epochs"])
@pytest.mark.parametrize(
    "sampler",
    [
        {"randint": [1, 9]},
        {"qrandint": [2, 8, 2]},
        {"qrandint": [1, 8, 1]},
        {"lograndint": [1, 9]},
        {"quniform": [1, 8, 1]},
        {"qlograndint": [4, 64, 4]},
    ],
    ids=lambda sampler: next(iter(sampler)),
)
def test_what_a_sampler_draws_is_what_a_trial_takes(key, sampler):
    """A thousand draws of Ray Tune's own samplers; those that could be refused are refused before."""
    space = load_space("search_spaces/quickstart.yaml", [f"search.{key}={sampler}"])
    draws = {tune_space(space)[key].sample() for _ in range(1000)}
    assert len(draws) > 2
    for value in draws:
        space.trial_settings({key: value})
    assert (min(draws), max(draws)) == tuple(sampled_values(space.search[key]))


@pytest.mark.parametrize(
    "sampler",
    [{"qrandint": [1, 64, 4]}, {"quniform": [0.05, 0.5, 0.1]}, {"randint": [1, ".inf"]}],
    ids=lambda sampler: str(*sampler.items()),
)
def test_bounds_that_ray_tune_or_optuna_would_not_keep_are_refused(sampler):
    with pytest.raises(InputError, match=r"must be a multiple of q|takes the numbers"):
        load_space(
            "search_spaces/quickstart.yaml", [f"search.lora_alpha={sampler}".replace("'.inf'", ".inf")]
        )


@pytest.mark.parametrize("sampler", [{"qrandint": [1, 64, 4]}, {"qrandn": [8, 2, 1]}], ids=str)
def test_a_sweep_from_before_keeps_the_samplers_it_started_with(sampler, tmp_path):
    space = load_space("search_spaces/quickstart.yaml", []).model_dump(mode="json")
    content = {
        "space_file": "a.yaml",
        "digests": {"train": "d", "public": "e", "prompt": "f"},
        "space": {**space, "search": {"lora_r": sampler}},
    }
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    stored = reopen_sweep(tmp_path).space
    assert stored.search == {"lora_r": sampler}
    assert tune_space(stored)["lora_r"].sample() > 0
    assert sampled_values(sampler)


def test_a_home_folder_is_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    space = load_space("search_spaces/quickstart.yaml", ["data.train=~/train.json", "base_model.name=~/base"])
    assert (space.data.train, space.base_model.name) == (f"{tmp_path}/train.json", f"{tmp_path}/base")
