"""A hand on a running sweep: a trial stops at its next step, more are drawn, and after a kill as well."""

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from conftest import command, finished
from ray.tune.experiment import Experiment
from test_host import data, run, threads  # noqa: F401
from test_sweep import ledger, wait_for_a_report

from qlora.checkpoint_files import CheckpointError, verify_checkpoint
from qlora.config import InputError
from tuning.checkpoints import Storage, put_start
from tuning.host import Host
from tuning.ledger import Ledger, TrialRecord
from tuning.ledger_search import LedgerSearch
from tuning.orders import Order, Orders, give_order
from tuning.space import Space, tune_space
from workflows.lock import locked
from workflows.sweep.steering import ask_for_clone, ask_for_more, ask_to_stop, status


def test_orders_are_found_at_their_place_once_each(tmp_path):
    place = str(tmp_path)
    orders = Orders(place)
    assert (orders.stops, orders.added) == (set(), 0)
    give_order(place, Order(kind="add", count=3))
    give_order(place, Order(kind="stop", trial_id="42_00001"))
    assert not orders.look(), "it has just looked"
    orders._looked_at = 0
    assert orders.look()
    give_order(place, Order(kind="add", count=2))
    (tmp_path / "orders/cut.json").write_text('{"kind": "add", "cou')
    (tmp_path / "orders/odd.json").write_text('{"kind": "erase"}')
    orders._looked_at = 0
    orders.look()
    assert (orders.stops, orders.added) == ({"42_00001"}, 5)
    again = Orders(f"file://{tmp_path}")  # a sweep that goes on finds them at once
    assert (again.stops, again.added) == ({"42_00001"}, 5)
    give_order(f"file://{tmp_path}", Order(kind="add", count=10_000))
    assert Orders(place).added == 1000


def test_a_trial_that_is_to_end_ends_at_its_next_step_and_the_others_go_on(data, tmp_path):  # noqa: F811
    host = Host(data, 1)
    steps = host.attach("long", "holder", {"learning_rate": 0.01, "epochs": 500})
    with ThreadPoolExecutor(2) as pool:
        target = tmp_path / "long"
        target.mkdir()
        answer = pool.submit(host.advance, "long", steps[-1], str(target))
        other = pool.submit(run, host, "other", {"learning_rate": 0.01, "epochs": "1+1"}, tmp_path)
        time.sleep(0.3)
        assert not answer.done()
        host.end("long")
        assert answer.result(timeout=20) == {"by_hand": True}
        assert other.result(timeout=60)[-1]["schedule_percent"] == 100
    assert host.advance("long", steps[-1], str(target)) == {"by_hand": True}
    host.end("later")  # one that comes from a host that died
    host.attach("later", "holder", {"learning_rate": 0.01})
    assert host.advance("later", 3, str(target)) == {"by_hand": True}


SPACE = {
    "data": {"train": "t", "public": "p"},
    "search": {"learning_rate": {"loguniform": [1e-5, 1e-2]}},
    "num_samples": 3,
}


def drawn(searcher: dict, records: list[TrialRecord], place: Path) -> tuple[LedgerSearch, Orders]:
    """The searcher of a sweep of three trials, and what people ask of it at a place."""
    space = Space.model_validate({**SPACE, "searcher": searcher})
    orders = Orders(str(place))
    search = LedgerSearch(space, records, Storage.at(f"{place}/ray"), 64, orders=orders)
    search.set_search_properties("public_perplexity", "min", tune_space(space))
    samples = Experiment("x", lambda config: None, config=tune_space(space), num_samples=103)
    search.add_configurations([samples])
    return search, orders


def ask(place: Path, orders: Orders, **order) -> None:
    give_order(str(place), Order(**order))
    orders._looked_at = 0
    assert orders.look()


@pytest.mark.parametrize("searcher", [{"type": "random"}, {"type": "prior"}])
def test_trials_that_are_added_are_drawn_as_if_there_had_been_so_many(searcher, tmp_path):
    """Keeps those before them as they were, and ends when all of them are drawn."""
    search, orders = drawn(searcher, [], tmp_path)
    first = [search.next_trial() for _ in range(3)]
    assert search.next_trial() is None and search.is_finished()
    assert search.total_samples == 3
    ask(tmp_path, orders, kind="add", count=2)
    assert not search.is_finished()
    added = [search.next_trial() for _ in range(2)]
    assert search.next_trial() is None and search.is_finished()
    whole, _ = drawn(searcher, [], tmp_path)  # which knows of five from the start
    expected = [whole.next_trial() for _ in range(5)]
    assert [one.trial_id for one in first + added] == [one.trial_id for one in expected]
    assert [one.config for one in first + added] == [one.config for one in expected]


@pytest.mark.parametrize("searcher", [{"type": "random"}, {"type": "prior"}, {"type": "optuna"}])
def test_a_clone_is_the_next_trial_and_a_sweep_that_goes_on_has_it_once(searcher, tmp_path):
    if searcher["type"] == "optuna":
        pytest.importorskip("optuna")
    search, orders = drawn(searcher, [], tmp_path)
    search.next_trial()
    ask(tmp_path, orders, kind="clone", trial_id="42_00000", settings={"learning_rate": 0.0123})
    clone = search.next_trial()
    assert clone.config == {"learning_rate": 0.0123}
    assert list(search.clones) == [clone.trial_id] == ["42_00001"]
    assert search.total_samples == 4
    others = [search.next_trial() for _ in range(2)]
    assert all(one.config != clone.config for one in others)
    (name,) = orders.clones
    settings = Space.model_validate(SPACE).trial_settings(clone.config).model_dump(mode="json")
    point = {"step": 4.0, "epoch": 1.0, "schedule_percent": 50.0, "public_perplexity": 9.0}
    record = TrialRecord(clone.trial_id, settings, "running", (point,), cloned_from="42_00000", order=name)
    first = TrialRecord("42_00000", settings, "running")
    again, _ = drawn(searcher, [first, record], tmp_path)
    configs = [again.next_trial().config for _ in range(4)]
    assert configs.count(clone.config) >= 1 and configs[1] == clone.config
    assert not again.clones, "the order was taken before"
    for number in range(4):  # results of clones are learned from, too, or at least do no harm
        again.on_trial_result(f"42_{number:05d}", {**point, "training_iteration": 1})
        again.on_trial_complete(f"42_{number:05d}", point)


def test_a_warm_clone_begins_with_the_adapter_as_the_trial_has_it(data, tmp_path):  # noqa: F811
    """Its first perplexity is the trial's; its optimizer and its schedule are fresh."""
    host, storage = Host(data, 1), Storage.at(str(tmp_path / "ray"))
    config = {"learning_rate": 0.01, "lora_r": 4, "epochs": "1+1"}
    points = run(host, "one", config, tmp_path)
    for number, point in enumerate(points):
        shutil.copytree(tmp_path / f"one-{point['step']}", tmp_path / f"ray/one/checkpoint_{number:06d}")
    put_start(storage, "one", "two")
    start = tmp_path / "ray/two/checkpoint_stopped"
    verify_checkpoint(start)
    found = run(host, "two", {**config, "learning_rate": 1e-12}, tmp_path, str(start))
    assert [point["step"] for point in found] == [point["step"] for point in points]
    assert found[0]["public_perplexity"] == pytest.approx(points[-1]["public_perplexity"], rel=1e-5)
    assert found[0]["learning_rate"] < 1e-11
    damaged = tmp_path / f"ray/one/checkpoint_{len(points) - 1:06d}" / "position.json"
    damaged.write_text("{}")
    put_start(storage, "one", "three")  # from the one before
    before = run(
        host, "three", {**config, "learning_rate": 1e-12}, tmp_path, str(start).replace("two", "three")
    )
    assert before[0]["public_perplexity"] == pytest.approx(points[-2]["public_perplexity"], rel=1e-5)
    with pytest.raises(CheckpointError, match="trial none has no checkpoint"):
        put_start(storage, "none", "four")


@pytest.fixture
def unfinished(project):
    """A sweep's folder as a driver that was killed leaves it: one trial has ended, one was running."""
    folder = project / "results/steered"
    space = yaml.safe_load((project / "space.yaml").read_text())
    content = {"sweep": "steered", "sweep_id": "1", "space_file": "space.yaml", "space": space}
    folder.mkdir(parents=True, exist_ok=True)
    digests = {"train": "x", "public": "x", "prompt": "x"}
    (folder / "sweep.json").write_text(json.dumps({**content, "digests": digests}))
    (folder / "zero_shot.json").write_text('{"public_perplexity": 500.0}')
    config = Space.model_validate(space).trial_settings({"learning_rate": 0.01}).model_dump(mode="json")
    point = dict.fromkeys(("schedule_percent", "training_loss", "learning_rate", "tokens_per_second"), 50.0)
    point |= {"step": 4.0, "epoch": 1.0, "public_perplexity": 123.4, "peak_memory_gib": 0.0}
    known = Ledger(folder / "trials")
    known.put(TrialRecord("42_00000", config, "stopped", (point,), started_at=1.0, ended_at=31.0))
    known.put(TrialRecord("42_00001", config, "running", (point,), started_at=1.0))
    return folder


def test_what_is_asked_is_checked_and_left_beside_the_sweep(project, unfinished, monkeypatch):
    monkeypatch.setenv("QLORA_HOME", str(project))
    told = status("steered", now=61.0)
    assert "42_00001" in told and "123.4" in told
    assert "1/5 trials ended, 1 running, 1 stopped early, best 123.4 (42_00000), elapsed 1:00" in told
    assert "stopped     no process of this machine works on it; the sweep can go on: python" in told
    with locked(unfinished):
        assert "no process" not in status("steered", now=61.0)
    assert "trial 42_00001 is to stop with what it has" in ask_to_stop("steered", "42_00001")
    assert "3 more, 8 trials in all" in ask_for_more("steered", 3)
    orders = Orders(str(unfinished))
    assert (orders.stops, orders.added) == ({"42_00001"}, 3)
    assert "1/8 trials ended" in status("steered", now=61.0)
    with pytest.raises(InputError, match="trial 42_00000 has ended: it is stopped"):
        ask_to_stop("steered", "42_00000")
    with pytest.raises(InputError, match="steered has begun no trial none; it has 42_00001"):
        ask_to_stop("steered", "none")
    words = ask_for_clone("steered", "42_00001", ["learning_rate=0.02"], True)
    assert "a clone of trial 42_00001, 9 trials in all" in words
    (order,) = Orders(str(unfinished)).clones.values()
    assert order.settings == {"learning_rate": 0.02, "epochs": 1}
    for overrides, problem in (
        (["lora_r=8"], "must read KEY=VALUE, of what is searched: epochs, learning_rate"),
        (["learning_rate=fast"], "learning_rate: 'fast'"),
        (["learning_rate"], "must read KEY=VALUE"),
    ):
        with pytest.raises(InputError, match=problem):
            ask_for_clone("steered", "42_00001", overrides, False)
    with pytest.raises(InputError, match="1004 are more than the 1000 trials that can be added"):
        ask_for_more("steered", 1000)
    best = {"trial_id": None, "public_perplexity": 1.0, "checkpoint": "c", "model_uri": "m"}
    summary = {"zero_shot": 500.0, "best": best, "champion": {"is_champion": True, "reason": "r"}}
    (unfinished / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(InputError, match="has finished"):
        ask_for_more("steered", 1)
    assert "finished    see" in status("steered", now=61.0)


def test_the_command_says_what_is_wrong_in_a_line(project, unfinished):
    out = finished(command(project, "steer", "steered", "status"))
    assert "42_00001" in out
    for arguments in (("add", "0"), ("pause",), ("stop",), ("status", "42_00001"), ("stop", "x", "--warm")):
        process = command(project, "steer", "steered", *arguments)
        told, _ = process.communicate(timeout=60)
        assert process.returncode == 2
        assert told.startswith("error: steer.py: ") and told.count("\n") == 1


@pytest.mark.ray
@pytest.mark.slow
def test_a_running_sweep_is_steered_and_one_that_goes_on_knows_it(project):
    """A trial is stopped between two reports, two are added; the driver is killed in between."""
    space = yaml.safe_load((project / "space.yaml").read_text())
    space |= {"num_samples": 2, "scheduler": {"type": "fifo"}, "registered_model": "steered"}
    space["trial"] |= {"epochs": 4000}
    space["search"] = {"learning_rate": {"loguniform": [1e-4, 1e-3]}}
    (project / "endless.yaml").write_text(yaml.safe_dump(space))
    first = command(project, "tune", "--space", "endless.yaml", "--name", "hand", start_new_session=True)
    wait_for_a_report(first, project, "hand")
    while len(ledger(project, "hand")) < 2:  # the second trial may begin behind the first one's report
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.2)
    one, two = sorted(ledger(project, "hand"))
    finished(command(project, "steer", "hand", "stop", one))
    deadline = time.monotonic() + 60
    while ledger(project, "hand")[one]["status"] != "stopped":
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.2)
    assert ledger(project, "hand")[one]["error"] == "stopped by hand"
    assert ledger(project, "hand")[two]["status"] == "running"
    finished(command(project, "steer", "hand", "add", "1"))
    finished(command(project, "steer", "hand", "clone", one, "--set", "learning_rate=1e-3", "--warm"))
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    finished(command(project, "steer", "hand", "stop", two))
    second = command(project, "tune", "--resume", "hand", start_new_session=True)
    asked = set()
    while second.poll() is None and time.monotonic() < deadline + 120:
        for trial, record in ledger(project, "hand").items():
            if trial not in (one, two, *asked) and record["status"] == "running" and record["curve"]:
                finished(command(project, "steer", "hand", "stop", trial))
                asked.add(trial)
        time.sleep(0.5)
    finished(second)
    records = ledger(project, "hand")
    assert len(records) == 4
    assert all((one["status"], one["error"]) == ("stopped", "stopped by hand") for one in records.values())
    summary = json.loads((project / "results/hand/summary.json").read_text())
    assert len(summary["trials"]) == 4
    (clone,) = (trial for trial in summary["trials"] if trial.get("cloned_from"))
    assert (clone["cloned_from"], clone["config"]["learning_rate"]) == (one, 1e-3)
    known = min(point["public_perplexity"] for point in records[one]["curve"])
    assert clone["curve"][0]["public_perplexity"] < 1.2 * known < 0.8 * summary["zero_shot"]
