"""Clones of trials begin at once: who makes room for them, and that nothing is lost or drawn otherwise."""

import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import command, finished
from ray import tune
from ray.tune.experiment import Experiment
from ray.tune.schedulers import FIFOScheduler
from test_host import data, run, threads  # noqa: F401
from test_steer import SPACE, ask, drawn
from test_sweep import ledger

from qlora.checkpoint_files import verify_checkpoint
from tuning.checkpoints import Storage
from tuning.clone_seats import CloneSeats
from tuning.host import Host
from tuning.ledger import TrialRecord
from tuning.ledger_search import LedgerSearch
from tuning.orders import Order, Orders
from tuning.restored_scheduler import RestoredScheduler
from tuning.space import Space, tune_space
from tuning.trial import _newest_whole_checkpoint


class Asked:
    """Clones that people asked for, as a searcher has them: `next_clone` gives each once."""

    def __init__(self, *trials):
        self._trials, self.sources = list(trials), {}

    @property
    def upcoming_clone(self):
        order = Order(kind="clone", trial_id="source")
        return (self._trials[0].trial_id, order) if self._trials else None

    def next_clone(self):
        trial = self._trials.pop(0)
        self.sources[trial.trial_id] = "source"
        return trial


class RaysController:
    """Stands in for Ray's controller, as it is asked about trials and their processes."""

    def __init__(self, **statuses):
        self.trials = [SimpleNamespace(trial_id=name, status=status) for name, status in statuses.items()]
        self.scheduler, self._reuse_actors, self.reused, self.stopped = None, False, [], []
        self._trial_to_actor, self._actor_manager = self, self

    def get(self, trial):
        return trial

    def is_actor_started(self, trial):
        return trial.status == "RUNNING"

    def __getitem__(self, trial_id):
        return next(trial for trial in self.trials if trial.trial_id == trial_id)

    def get_trials(self):
        return self.trials

    def add_trial(self, trial):
        self.trials.append(trial)
        self.scheduler.on_trial_add(self, trial)

    def pause_trial(self, trial, should_checkpoint):
        assert not should_checkpoint
        trial.status = "PAUSED"
        self.reused.append(self._reuse_actors)

    def stop_trial(self, trial):
        trial.status = "TERMINATED"
        self.stopped.append(trial.trial_id)


@pytest.fixture
def seats(monkeypatch):
    """Provides a scheduler over a controller whose trials have all seats, and whom it asked to leave."""
    monkeypatch.setattr("tuning.clone_seats._SECONDS_TO_FIND_A_SEAT", 0.0)
    monkeypatch.setattr("tuning.clone_seats._SECONDS_BETWEEN_WISHES", 0.0)

    def make(controller, records=(), most=math.inf):
        asked = Asked(SimpleNamespace(trial_id="clone", status="PENDING"))
        scheduler = controller.scheduler = RestoredScheduler(FIFOScheduler(), [])
        wishes, gone_on = [], []
        scheduler.clones = CloneSeats(asked, records, wishes.append, gone_on.append, most)
        return scheduler, wishes, gone_on

    return make


def scored(trial_id: str, score: float) -> TrialRecord:
    return TrialRecord(trial_id, {}, "running", ({"public_perplexity": score},))


def test_a_clone_begins_before_trials_that_wait(seats):
    controller = RaysController(a="PENDING", b="PENDING", c="RUNNING")
    scheduler, _, _ = seats(controller)
    assert scheduler.choose_trial_to_run(controller).trial_id == "clone"


def test_the_worst_trial_makes_room_for_a_clone_and_goes_on_before_those_that_wait(seats, monkeypatch):
    controller = RaysController(
        waits="PENDING", good="RUNNING", bad="RUNNING", source="RUNNING", new="RUNNING"
    )
    records = [scored("good", 3.0), scored("bad", 4.0), scored("source", 5.0)]
    scheduler, wishes, gone_on = seats(controller, records)
    for _ in range(2):
        assert scheduler.choose_trial_to_run(controller).trial_id == "clone"
    assert wishes == ["bad", "bad"], "it has not left yet"
    monkeypatch.setattr("tuning.clone_seats._SECONDS_TO_FIND_A_SEAT", 60.0)
    bad = controller["bad"]
    result = {"score": math.inf, "public_perplexity": math.inf, "set_aside": True}
    assert scheduler.on_trial_result(controller, bad, result) == "NOOP"
    assert bad.status == "PAUSED" and gone_on == [bad]
    assert controller.reused == [True] and not controller._reuse_actors, "its process goes to the clone alone"
    assert scheduler.choose_trial_to_run(controller).trial_id == "clone"
    controller["clone"].status = "RUNNING"
    assert scheduler.choose_trial_to_run(controller) is bad
    assert wishes == ["bad", "bad"]
    scheduler.ended_by_hand.add("bad")
    assert scheduler.choose_trial_to_run(controller).trial_id == "waits"
    assert controller.stopped == ["bad"]


def test_a_clone_that_has_a_seat_or_may_have_one_sets_nobody_aside(seats, monkeypatch):
    controller = RaysController(one="RUNNING")
    scheduler, wishes, _ = seats(controller)
    controller.is_actor_started = lambda trial: True  # its process starts
    for _ in range(3):
        assert scheduler.choose_trial_to_run(controller).trial_id == "clone"
    assert not wishes
    monkeypatch.setattr("tuning.clone_seats._SECONDS_TO_FIND_A_SEAT", 60.0)
    controller = RaysController(one="RUNNING")
    scheduler, wishes, _ = seats(controller)
    for _ in range(3):
        assert scheduler.choose_trial_to_run(controller).trial_id == "clone"
    assert not wishes, "it may be about to have one"
    monkeypatch.setattr("tuning.clone_seats._SECONDS_TO_FIND_A_SEAT", 0.0)
    controller = RaysController(one="PENDING")
    scheduler, wishes, _ = seats(controller)
    for _ in range(3):
        scheduler.choose_trial_to_run(controller)
    assert not wishes, "nobody runs"


def test_a_clone_is_one_of_the_trials_at_once_whatever_room_there_is(seats):
    controller = RaysController(one="RUNNING", two="RUNNING")
    scheduler, wishes, _ = seats(controller, [scored("one", 3.0), scored("two", 4.0)], most=2)
    for _ in range(2):
        assert scheduler.choose_trial_to_run(controller) is None
    assert wishes == ["two", "two"] and len(controller.trials) == 2, "there is no clone yet"
    result = {"score": math.inf, "public_perplexity": math.inf, "set_aside": False}
    scheduler.on_trial_result(controller, controller["two"], result)
    clone = scheduler.choose_trial_to_run(controller)
    assert clone.trial_id == "clone"
    clone.status = "RUNNING"
    assert scheduler.choose_trial_to_run(controller) is None, "who was set aside waits for one of them"
    controller["one"].status = "TERMINATED"
    assert scheduler.choose_trial_to_run(controller).trial_id == "two"


def test_clones_of_before_a_stop_are_clones_too(seats):
    controller = RaysController(old="RUNNING", worse="RUNNING")
    scheduler, wishes, _ = seats(controller, [scored("old", 9.0), scored("worse", 4.0)])
    scheduler.clones._search.sources["old"] = "source"
    scheduler.choose_trial_to_run(controller)
    scheduler.choose_trial_to_run(controller)
    assert set(wishes) == {"worse"}
    controller["old"].status = "PENDING"
    assert scheduler.choose_trial_to_run(controller).trial_id == "old", "before those that wait"


def test_a_clone_has_its_number_from_when_it_is_made(tmp_path):
    """A sweep that is killed before its clone begins, behind a trial that did, has the same trials again."""
    search, orders = drawn({"type": "random"}, [], tmp_path)
    kept = []
    search._keep = kept.append
    first = search.next_trial()
    ask(tmp_path, orders, kind="clone", trial_id=first.trial_id, settings={"learning_rate": 0.0123})
    trials = [first, *(search.next_trial() for _ in range(3))]
    assert [(one.trial_id, one.status, one.cloned_from) for one in kept] == [
        ("42_00001", "pending", "42_00000")
    ]
    space = Space.model_validate(SPACE)

    def begun(number: int) -> TrialRecord:
        return TrialRecord(trials[number].trial_id, space.trial_config(trials[number].config), "running")

    again, _ = drawn({"type": "random"}, [begun(0), kept[0], begun(3)], tmp_path)
    found = [again.next_trial() for _ in range(4)]
    assert [one.trial_id for one in found] == ["42_00000", "42_00001", "42_00003", "42_00002"]
    assert {one.trial_id: one.config for one in found} == {one.trial_id: one.config for one in trials}
    assert again.sources == {"42_00001": "42_00000"}
    assert again.next_trial() is None and again.is_finished()
    ask(tmp_path, orders, kind="clone", trial_id=first.trial_id, settings={"learning_rate": 0.0456})
    again._orders._looked_at = 0
    again._orders.look()
    assert again.next_clone().trial_id == "42_00004"


def test_a_warm_clone_has_its_start_before_it_has_its_number(tmp_path, monkeypatch):
    """Killed in between, it is made once more."""
    search, orders = drawn({"type": "random"}, [], tmp_path)
    kept = []
    search._keep = kept.append

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("tuning.ledger_search.put_start", killed)
    first, settings = search.next_trial().trial_id, {"learning_rate": 0.01}
    ask(tmp_path, orders, kind="clone", trial_id=first, settings=settings, is_warm=True)
    with pytest.raises(KeyboardInterrupt):
        search.next_trial()
    assert not kept


def test_trials_that_had_not_begun_are_drawn_one_at_a_time_when_a_sweep_goes_on(tmp_path):
    space = Space.model_validate(SPACE)
    config = space.trial_config({"learning_rate": 0.01})
    search, _ = drawn({"type": "prior"}, [TrialRecord("42_00001", config, "running")], tmp_path)
    found = [(search.next_trial().trial_id, search._ids.count) for _ in range(3)]
    assert found == [("42_00001", 2), ("42_00000", 2), ("42_00002", 3)]
    assert search.next_trial() is None and search.is_finished()


def test_clones_leave_rounds_their_room_and_other_searchers_no_more_than_there_is(tmp_path):
    asked = {"learning_rate": 0.01}
    for scheduler, expected in (({"type": "fifo"}, 0), ({"type": "rounds", "trials": 2, "kept": 1}, 1)):
        place = tmp_path / scheduler["type"]
        space = Space.model_validate({**SPACE, "max_concurrent_trials": 2, "scheduler": scheduler})
        orders = Orders(str(place))
        search = LedgerSearch(space, [], Storage.at(f"{place}/ray"), 64, orders=orders)
        search.add_configurations(
            [Experiment("x", lambda config: None, config=tune_space(space), num_samples=9)]
        )
        one = search.next_trial()
        ask(place, orders, kind="clone", trial_id=one.trial_id, settings=asked)
        assert search.next_trial().config == asked
        assert sum(search.next_trial() is not None for _ in range(1)) == expected
        ask(place, orders, kind="clone", trial_id=one.trial_id, settings=asked)
        assert search.next_trial() is None, "a scheduler makes room for it"
        assert search.next_clone().config == asked


@contextmanager
def on_its_way(host: Host, name: str, config: dict, folder: Path):
    """Provide the answer that a trial between two reports waits for, and the step of its next one."""
    steps = host.attach(name, "holder", config)
    with ThreadPoolExecutor(1) as pool:
        target = folder / f"{name}-on-its-way"
        target.mkdir()
        answer = pool.submit(host.advance, name, steps[-1], str(target))
        time.sleep(0.3)
        yield answer, steps[-1]


def test_a_sweep_that_stops_keeps_who_is_being_set_aside(data, tmp_path, monkeypatch):  # noqa: F811
    host, storage = Host(data, 1), Storage.at(str(tmp_path / "ray"))
    put = Storage.put

    def slow(self, *arguments):
        time.sleep(0.5)
        put(self, *arguments)

    monkeypatch.setattr(Storage, "put", slow)
    with on_its_way(host, "one", {"learning_rate": 0.01, "epochs": 500}, tmp_path) as (answer, _):
        host.set_aside("one", storage)
        host.stop(storage)
        verify_checkpoint(tmp_path / "ray/one/checkpoint_stopped")
        assert answer.result(timeout=20) == {"set_aside": True}


def test_a_trial_that_is_set_aside_goes_on_exactly_where_it_stood(data, tmp_path):  # noqa: F811
    """Between two reports, at once after one, and before its first step."""
    host, storage = Host(data, 1), Storage.at(str(tmp_path / "ray"))
    config = {"learning_rate": 0.01, "epochs": 100}
    expected = run(host, "undisturbed", config, tmp_path)
    stopped = tmp_path / "ray/one/checkpoint_stopped"
    with on_its_way(host, "one", config, tmp_path) as (answer, last):
        host.set_aside("one", storage)
        assert answer.result(timeout=20) == {"set_aside": True}
    verify_checkpoint(stopped)
    (stored,) = storage.checkpoints("one")
    assert 0 < stored.step < last
    host.detach("one")
    again = host.attach("one", "holder", config, str(stopped))
    assert again == [point["step"] for point in expected if point["step"] >= stored.step]
    host.detach("one")
    found = run(host, "one", config, tmp_path, str(stopped))
    assert found[-1]["step"] == expected[-1]["step"]
    assert found[-1]["public_perplexity"] == pytest.approx(expected[-1]["public_perplexity"], rel=1e-6)
    host.attach("two", "holder", config)
    host.set_aside("two", storage)
    assert host.advance("two", 1, str(tmp_path)) == {"set_aside": False}
    assert not (tmp_path / "ray/two").exists()
    host.set_aside("none", storage)  # one that is elsewhere


def test_a_trial_goes_on_from_where_it_was_set_aside_not_from_a_report_that_nobody_took_in(
    data,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """The newest of Ray's is the one of being set aside; a later one was written, and its point is lost."""
    host, storage, config = Host(data, 1), Storage.at(str(tmp_path)), {"learning_rate": 0.01, "epochs": 3}
    steps = host.attach("one", "holder", config)
    for number, step in enumerate(steps[:2]):
        (target := tmp_path / f"one/checkpoint_{number:06d}").mkdir(parents=True)
        host.advance("one", step, str(target))
    (tmp_path / "one/checkpoint_000000").rename(tmp_path / "one/checkpoint_stopped")
    newest = tune.Checkpoint(f"{storage.path}/one/checkpoint_stopped", storage.filesystem)
    monkeypatch.setattr(tune, "get_checkpoint", lambda: newest)
    with _newest_whole_checkpoint() as (found, notes):
        assert (Path(found).name, notes) == ("checkpoint_stopped", [])


def test_a_trial_that_had_just_come_back_has_its_last_score(tmp_path):
    search, _ = drawn({"type": "random"}, [], tmp_path)
    told = []
    search._inner.on_trial_complete = lambda trial_id, result, error: told.append((result, error))
    for end in ({"score": math.inf}, {"score": math.inf, "diverged": "it did"}, None):
        trial_id = search.next_trial().trial_id
        search.on_trial_result(trial_id, {"score": 9.0, "training_iteration": 1})
        search.on_trial_complete(trial_id, end)
    known = {"score": 9.0, "training_iteration": 1}
    assert told == [(known, False), (None, True), (known, False)]


def test_a_grid_keeps_each_of_its_values_beside_a_clone(tmp_path):
    space = Space.model_validate({**SPACE, "search": {"learning_rate": {"grid_search": [0.1, 0.2, 0.3]}}})
    space = space.model_copy(update={"num_samples": 1})
    orders = Orders(str(tmp_path))
    search = LedgerSearch(space, [], Storage.at(f"{tmp_path}/ray"), 64, orders=orders)
    search.add_configurations([Experiment("x", lambda config: None, config=tune_space(space), num_samples=9)])
    first = search.next_trial()
    ask(tmp_path, orders, kind="clone", trial_id=first.trial_id, settings={"learning_rate": 0.7})
    rates = [search.next_trial().config["learning_rate"] for _ in range(3)]
    assert rates == [0.7, 0.2, 0.3]
    assert search.next_trial() is None and search.is_finished()


def test_a_clone_counts_among_the_trials_at_once(tmp_path):
    space = Space.model_validate({**SPACE, "max_concurrent_trials": 2})
    orders = Orders(str(tmp_path))
    search = LedgerSearch(space, [], Storage.at(f"{tmp_path}/ray"), 64, orders=orders)
    search.add_configurations([Experiment("x", lambda config: None, config=tune_space(space), num_samples=9)])
    one = search.next_trial()
    ask(tmp_path, orders, kind="clone", trial_id=one.trial_id, settings={"learning_rate": 0.01})
    clone = search.next_trial()
    assert search.next_trial() is None and not search.is_finished()
    search.on_trial_complete(clone.trial_id)
    assert search.next_trial() is not None


KINDS = {
    "a grid": {"search": {"learning_rate": {"grid_search": [1e-4, 1e-3]}}, "num_samples": 1},
    "rounds": {"scheduler": {"type": "rounds", "trials": 2, "kept": 1, "steps": 2}},
    "a stop in between": {},
}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_clone_begins_at_once_where_all_seats_are_taken(project, kind):
    """Who made room for it goes on exactly where it stood, also if the sweep is killed meanwhile."""
    space = yaml.safe_load((project / "space.yaml").read_text())
    space |= {"num_samples": 2, "scheduler": {"type": "fifo"}, "registered_model": "seats"}
    space["search"] = {"learning_rate": {"loguniform": [1e-4, 1e-3]}}
    space |= {"resources_per_trial": {"cpu": os.cpu_count()}} | KINDS[kind]
    space["trial"] |= {"epochs": 4000}
    (project / "taken.yaml").write_text(yaml.safe_dump(space))
    name = f"taken-{list(KINDS).index(kind)}"
    process = command(project, "tune", "--space", "taken.yaml", "--name", name, start_new_session=True)

    def wait_for(condition):
        deadline = time.monotonic() + 120
        while not condition(records := ledger(project, name)):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, records
            time.sleep(0.1)
        return ledger(project, name)

    def running(records, clones):
        return [
            trial
            for trial, record in records.items()
            if record["status"] == "running" and (record["cloned_from"] is not None) == clones
        ]

    on_its_way = 3  # points: behind the comparison of its round, too
    records = wait_for(lambda records: any(len(one["curve"]) >= on_its_way for one in records.values()))
    (first,) = running(records, clones=False)
    finished(command(project, "steer", name, "clone", first, "--set", "learning_rate=5e-4"))
    records = wait_for(lambda records: running(records, clones=True))
    (clone,) = running(records, clones=True)
    assert records[first]["status"] == "pending", "there is one seat"
    finished(command(project, "steer", name, "add", "1"))
    if kind == "a stop in between":
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process = command(project, "tune", "--resume", name, start_new_session=True)
    ended, points = [], len(records[first]["curve"])
    while process.poll() is None:
        for trial in (records := ledger(project, name)):
            enough = points if trial == first else 0
            is_on_its_way = records[trial]["status"] == "running" and len(records[trial]["curve"]) > enough
            if is_on_its_way and trial not in ended:
                finished(command(project, "steer", name, "stop", trial))
                ended.append(trial)
        time.sleep(0.3)
    finished(process)
    records = ledger(project, name)
    assert len(records) == 4, records.keys()
    assert (records[clone]["cloned_from"], records[clone]["config"]["learning_rate"]) == (first, 5e-4)
    assert all(record["status"] == "stopped" for record in records.values())
    assert len(records[first]["curve"]) > points
    steps = [point["step"] for point in records[first]["curve"]]
    assert steps == sorted(set(steps)), "no point came twice"
    if kind == "a grid":
        rates = [one["config"]["learning_rate"] for one in records.values() if one["cloned_from"] is None]
        assert sorted(rates[:2]) == [1e-4, 1e-3]
