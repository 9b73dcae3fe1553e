"""A sweep with a budget ends by itself, as finished with what it has; all of its sittings count."""

import json
import os
import signal
from dataclasses import replace

import pytest
import yaml
from conftest import command, finished
from pydantic import ValidationError
from test_sweep import wait_for_a_report

import tuning.spending
from tuning.ledger import TrialRecord, share_of_epochs_saved
from tuning.progress import headline, spending
from tuning.space import Space
from tuning.spending import SpendingClock, Spent, spent_so_far
from tuning.strategy import Budget

SPACE = {"data": {"train": "t", "public": "p"}, "search": {"learning_rate": {"choice": [1e-3]}}}


@pytest.fixture
def at(monkeypatch):
    """A clock that tests set."""
    now = [100.0]
    monkeypatch.setattr(tuning.spending.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 100.0 + seconds)


def test_time_counts_while_trials_run_and_a_gpu_as_a_whole(tmp_path, at):
    """As many devices as trials are on; while that is not known, as many as they can be on."""
    known = {"there": 0}
    clock = SpendingClock(Budget(gpu_seconds=80), tmp_path, 2, lambda trial_ids: known["there"])
    clock.count(["a"])
    at(10)
    clock.count(["a"])  # on one of two devices
    at(20)
    clock.count(list("abcde"))
    at(30)
    clock.count([])
    assert (clock.spent.seconds, clock.spent.device_seconds) == (20, 10 + 20)
    known["there"] = 4  # devices that joined later
    at(40)
    clock.count(list("abcde"))
    assert not clock.stop_all()
    at(50)
    known["there"] = 1  # all of them on one
    clock.count(list("abcde"))
    assert clock.stop_all()
    assert spent_so_far(tmp_path) == clock.spent == Spent(40, 80, is_over=True)
    assert clock("t", {}) is False


def test_what_was_spent_in_sittings_before_counts(tmp_path, at):
    first = SpendingClock(Budget(minutes=1), tmp_path, num_devices=1)
    first.count(["a"])
    at(50)
    first.count(["a"])
    first.keep()
    second = SpendingClock(Budget(minutes=1), tmp_path, num_devices=1)
    at(1000)  # between two sittings nothing runs
    second.count(["a"])
    assert not second.stop_all()
    at(1010)
    second.count(["a"])
    assert second.stop_all()


def test_a_machine_that_slept_has_not_worked(tmp_path, at):
    clock = SpendingClock(None, tmp_path, num_devices=1)
    clock.count(["a"])
    at(8 * 3600)
    clock.count(["a"])
    assert clock.spent.seconds == 60
    assert not clock.stop_all(), "there is no budget"


def test_what_a_budget_cut_is_not_saved_by_early_stopping():
    point = {"step": 1.0, "epoch": 2.0, "schedule_percent": 20.0, "public_perplexity": 5.0}
    config = {"epochs": 10, "learning_rate": 1e-3}
    stopped = TrialRecord("a", config, "stopped", (point,))
    cut = replace(stopped, trial_id="b", error="the budget was spent")
    assert share_of_epochs_saved([stopped]) == pytest.approx(0.8)
    assert share_of_epochs_saved([cut]) == 0
    assert cut.reason == "the budget was spent, at 20 % of its schedule"
    assert "1 stopped early, 1 cut" in headline([stopped, cut], 2, 60.0)


def test_a_damaged_file_of_what_was_spent_begins_anew(tmp_path):
    (tmp_path / "spent.json").write_text("{")
    assert spent_so_far(tmp_path) == Spent()


def test_a_budget_is_checked_before_work_starts():
    with pytest.raises(ValidationError, match="give minutes or gpu_seconds"):
        Space.model_validate({**SPACE, "budget": {}})
    with pytest.raises(ValidationError, match="ask for no GPU"):
        Space.model_validate({**SPACE, "budget": {"gpu_seconds": 5}})
    assert Space.model_validate({**SPACE, "budget": {"gpu_seconds": 5}, "trials_per_gpu": 2}).budget
    with pytest.raises(ValidationError):
        Space.model_validate({**SPACE, "budget": {"minutes": 0}})


def test_what_was_spent_is_told():
    spent = Spent(104, 208, is_over=True)
    words = spending(spent, Budget(gpu_seconds=200), has_gpu=True)
    assert words == "spent       1:44 of trials, 208 GPU-seconds; the budget of 200 GPU-seconds is spent"
    assert spending(replace(spent, is_over=False), None, has_gpu=False) == "spent       1:44 of trials"


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_whose_budget_is_spent_ends_as_finished_with_what_it_has(project):
    """It is killed once on its way: the rest of the budget is what it then has."""
    space = yaml.safe_load((project / "space.yaml").read_text())
    space |= {"num_samples": 40, "budget": {"minutes": 0.25}, "registered_model": "short", "soup": True}
    space["trial"] |= {"epochs": 30}
    space["search"] = {"learning_rate": {"loguniform": [1e-4, 1e-2]}}
    space["scheduler"] = {"type": "fifo"}
    (project / "short.yaml").write_text(yaml.safe_dump(space))
    process = command(project, "tune", "--space", "short.yaml", "--name", "short", start_new_session=True)
    wait_for_a_report(process, project, "short")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    out = finished(command(project, "tune", "--resume", "short"))
    assert "budget      0.25 minutes; the sweep then ends with what it has" in out
    assert "of trials; the budget of 0.25 minutes is spent" in out
    summary = json.loads((project / "results/short/summary.json").read_text())
    assert 0 < len(summary["trials"]) < 40
    assert {trial["status"] for trial in summary["trials"]} <= {"finished", "stopped"}
    cut = [trial for trial in summary["trials"] if trial["status"] == "stopped"]
    assert cut
    assert all(trial["error"] == "the budget was spent" for trial in cut)
    assert summary["spent"]["was_budget"]
    assert 15 <= summary["spent"]["minutes"] * 60 < 25
    assert summary["best"]["model_uri"] == "models:/short/1"
