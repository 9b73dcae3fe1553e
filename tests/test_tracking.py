"""The tracking server: training never waits for it; nothing is lost while it is away, or logged twice."""

import contextlib
import math
import signal
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import pytest
from tracking_servers import Door, sqlite_server

from tracking import registry, runs, store, system_load
from tracking.errors import TrackingAwayError


@dataclass(frozen=True)
class Record:
    """A trial's record, as far as it is logged."""

    trial_id: str
    config: dict
    status: str = "running"
    curve: tuple = ()
    reason: str = ""

    def longer(self, *perplexities: float, **changes) -> "Record":
        curve = list(self.curve)
        for perplexity in perplexities:
            step = len(curve) + 1
            curve.append(
                {
                    "step": float(10 * step),
                    "epoch": float(step),
                    "schedule_percent": 25.0 * step,
                    "public_perplexity": perplexity,
                    "training_loss": 1.0,
                    "learning_rate": 1e-3,
                    "tokens_per_second": 100.0,
                    "peak_memory_gib": 1.0,
                }
            )
        return replace(self, curve=tuple(curve), **changes)


def trial(name: str) -> Record:
    return Record(name, {"learning_rate": 1e-3, "epochs": "1+1"})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with sqlite_server(tmp_path_factory.mktemp("server")) as port:
        yield port


@pytest.fixture(params=["server", "sqlite"])
def anywhere(request, tmp_path, monkeypatch):
    """A store of either kind."""
    if request.param == "server":
        uri = f"http://127.0.0.1:{request.getfixturevalue('server')}"
    else:
        uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    yield
    mlflow.set_tracking_uri(None)


@pytest.fixture
def door(server, tmp_path, monkeypatch):
    """A server that can be away; clients try once."""
    found = Door(server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", found.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield found
    with contextlib.suppress(OSError):
        found.shut()
    mlflow.set_tracking_uri(None)


def started(sweep: str) -> runs.SweepTracker:
    data = {"train": ("train.json", "d" * 64, 3)}
    tracker = runs.start_sweep(sweep, f"id of {sweep}", "team")
    runs.describe_sweep(tracker, {"seed": 0}, data)
    return tracker


def steps(run_id: str, metric: str = "public_perplexity") -> list[int]:
    return [one.step for one in store.connect().get_metric_history(run_id, metric)]


def test_a_trial_costs_few_requests(door):
    tracker = started("few")
    door.requests.clear()
    record = trial("a")
    tracker.trial_changed(record)
    tracker.catch_up(20)
    for perplexity in (5.0, 4.0):
        record = record.longer(perplexity)
        tracker.trial_changed(record)
        tracker.catch_up(20)
    tracker.trial_changed(last := record.longer(3.0))
    tracker.trial_changed(replace(last, status="finished"))
    tracker.catch_up(20)
    # Which runs there are (once a sweep), a run, its settings, each of three points, its end.
    assert len(door.requests) == 7, Counter(door.requests)
    run = store.connect().get_run(tracker.run_id(record))
    assert (run.info.status, run.data.tags["trial_status"]) == ("FINISHED", "finished")
    assert run.data.params == {"learning_rate": "0.001", "epochs": "1+1", "stages": "[1, 1]"}
    assert run.data.metrics["best_public_perplexity"] == 3.0
    assert steps(run.info.run_id) == [10, 20, 30]
    assert steps(run.info.run_id, "epoch_public_perplexity") == [1, 2, 3]


def test_training_goes_on_while_the_server_is_away(door, capfd):
    tracker = started("away")
    with tracker.system_metrics():
        tracker.trial_changed(record := trial("a").longer(9.0))
        tracker.catch_up(20)
        door.shut()
        began = time.monotonic()
        for perplexity in (8.0, 7.0, 6.0):
            tracker.trial_changed(record := record.longer(perplexity))
        tracker.trial_changed(record := replace(record, status="stopped", reason="ASHA, at 50 %"))
        tracker.trial_changed(other := trial("b").longer(3.0))
        assert time.monotonic() - began < 0.5
        with pytest.raises(TrackingAwayError, match="can't be reached: Connection refused") as caught:
            tracker.catch_up(3)
        assert len(str(caught.value).splitlines()) == 1
        door.open()
        tracker.catch_up(20)
    run = store.connect().get_run(tracker.run_id(record))
    assert (run.info.status, run.data.tags["reason"]) == ("FINISHED", "ASHA, at 50 %")
    assert steps(run.info.run_id) == [10, 20, 30, 40]
    assert steps(run.info.run_id, "epoch_training_loss") == [1, 2, 3, 4]
    assert steps(tracker.run_id(other)) == [10]
    assert tracker.end("FINISHED", {"zero_shot_public_perplexity": 9.0})
    client = store.connect()
    parent = client.get_run(tracker.parent_run_id)
    assert (parent.info.status, parent.data.metrics["zero_shot_public_perplexity"]) == ("FINISHED", 9.0)
    assert "system/cpu_utilization_percentage" in parent.data.metrics
    assert client.get_run(tracker.run_id(other)).info.status == "KILLED"
    assert capfd.readouterr() == ("", ""), "nobody prints"


def test_an_end_gives_up_in_time(door):
    tracker = started("hasty")
    tracker.trial_changed(record := trial("a"))
    tracker.catch_up(20)
    door.shut()
    tracker.trial_changed(record := record.longer(5.0))
    began = time.monotonic()
    assert not tracker.end("KILLED", {}, timeout_seconds=2)
    assert time.monotonic() - began < 2.5
    door.open()
    again = started("hasty")
    again.trial_changed(record)
    assert again.end("KILLED", {}, timeout_seconds=20)
    client = store.connect()
    assert client.get_run(again.parent_run_id).info.status == "KILLED"
    assert client.get_run(again.run_id(record)).info.status == "KILLED"
    assert steps(again.run_id(record)) == [10]


def test_a_restart_goes_on_where_the_server_is(anywhere):
    tracker = started("restart")
    tracker.trial_changed(record := trial("a").longer(5.0, 4.0))
    tracker.trial_changed(done := trial("b").longer(6.0, status="finished"))
    assert tracker.end("KILLED", {})
    again = started("restart")
    assert again.parent_run_id == tracker.parent_run_id
    again.trial_changed(done)
    again.trial_changed(record := record.longer(3.0))
    again.catch_up(20)
    assert again.run_id(record) == tracker.run_id(record)
    assert steps(again.run_id(record)) == [10, 20, 30]
    assert steps(again.run_id(done)) == [10]
    client = store.connect()
    assert client.get_run(again.run_id(record)).info.status == "RUNNING"
    assert len(store.children(client, again.experiment_id, again.parent_run_id)) == 2
    assert len(client.get_run(again.parent_run_id).inputs.dataset_inputs) == 1
    again.end("FINISHED", {})


def test_a_run_without_an_answer_is_found_again(door):
    """The server makes a run, and the answer is lost: the trial has this run, not a second one."""
    tracker = started("lost")
    tracker.trial_changed(trial("a"))
    tracker.catch_up(20)
    client, name = store.connect(), "lost-b"
    door.shut()
    tracker.trial_changed(record := trial("b").longer(5.0))
    with pytest.raises(TrackingAwayError):
        tracker.catch_up(1)
    door.open()
    tags = {"trial_id": "b", "sweep": "lost", store.PARENT: tracker.parent_run_id}
    client.create_run(tracker.experiment_id, run_name=name, tags=tags)
    tracker.catch_up(20)
    found = store.children(client, tracker.experiment_id, tracker.parent_run_id)
    assert sorted(run.info.run_name for run in found) == ["lost-a", "lost-b"]
    assert steps(tracker.run_id(record)) == [10]
    tracker.end("KILLED", {})


@pytest.mark.parametrize("answered", [3, 4, 5], ids=lambda number: f"after answer {number}")
def test_a_signal_while_a_run_is_made_leaves_none_running(door, answered):
    """Ctrl-C while the server is at it: what it makes of the request is ended nevertheless."""
    name = f"broken off {answered}"
    experiment_id = store.ensure_experiment(store.connect(), "team")
    door.requests.clear()

    def interrupt(*_) -> None:
        if len(door.requests) >= answered:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    door.delay_seconds = 0.1
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        with pytest.raises(KeyboardInterrupt):
            runs.note_study(
                "team", name, None, {"a": ({}, {"x": 1.0}), "b": ({}, {"x": 2.0})}, Path(__file__)
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        door.delay_seconds = 0.0
    found = store.connect().search_runs([experiment_id], f"tags.study = '{name}'")
    assert found or answered == 3  # the request that makes it may have been broken off in its middle
    assert "RUNNING" not in {run.info.status for run in found}


def test_samples_that_come_while_others_are_logged_are_left_for_the_next_time(anywhere):
    tracker = started("loaded")
    load = system_load.SystemLoad(tracker.parent_run_id, 0)
    for _ in range(30):
        load._sample()
    answers: list[int] = []

    def answered() -> None:
        answers.append(len(load._samples))
        load._sample()

    load.log(answered)
    assert answers == [5, 0], "two requests for thirty samples and one"
    assert len(load._samples) == 1
    tracker.end("KILLED", {})


def test_a_curve_that_is_no_number_is_kept(anywhere):
    tracker = started("diverged")
    record = trial("a").longer(5.0, math.inf, math.nan, status="diverged", reason="the loss is no number")
    tracker.trial_changed(record)
    tracker.catch_up(20)
    run = store.connect().get_run(tracker.run_id(record))
    assert run.info.status == "FAILED"
    told = [run.data.tags[key] for key in ("trial_status", "reason")]
    assert told == ["diverged", "the loss is no number"]
    history = store.connect().get_metric_history(run.info.run_id, "public_perplexity")
    assert [(one.step, math.isnan(one.value)) for one in history] == [(10, False), (20, True), (30, True)]
    assert run.data.metrics["best_public_perplexity"] == 5.0
    again = started("diverged")
    again.trial_changed(replace(record, status="running").longer(4.0))
    again.catch_up(20)
    assert steps(run.info.run_id) == [10, 20, 30, 40]
    again.end("KILLED", {})


def test_one_trial_that_cannot_be_logged_leaves_the_others(anywhere):
    tracker = started("odd")
    tracker.trial_changed(Record("a", {"epochs": "never"}))
    tracker.trial_changed(good := trial("b").longer(5.0))
    with pytest.raises(ValueError, match="epochs must be"):
        tracker.catch_up(20)
    assert steps(tracker.run_id(good)) == [10]


@pytest.mark.parametrize(
    "ask",
    [
        lambda tracker, tmp: started("other"),
        lambda tracker, tmp: tracker.note({"a": "b"}),
        lambda tracker, tmp: tracker.run_id(trial("new")),
        lambda tracker, tmp: tracker.end("FINISHED", {"seconds": 1.0}),
        lambda tracker, tmp: registry.fetch_adapter("models:/team@champion"),
        lambda tracker, tmp: registry.promote("team", "1"),
        lambda tracker, tmp: registry.roll_back("team"),
        lambda tracker, tmp: registry.versions("team"),
        lambda tracker, tmp: registry.register("team", "models:/m-1", "1", 1.0, "d", {}),
        lambda tracker, tmp: runs.note_study("studies", "s", None, {}, tmp / "page.html"),
    ],
)
def test_a_server_that_is_away_is_told_on_one_line(door, tmp_path, monkeypatch, ask):
    tracker = started("told")
    door.shut()
    monkeypatch.setattr("tracking.sweep_tracker._PATIENCE_SECONDS", 1)
    with pytest.raises(TrackingAwayError) as caught:
        ask(tracker, tmp_path)
    expected = f"the tracking server http://127.0.0.1:{door.port} can't be reached: Connection refused"
    assert str(caught.value) == expected


def test_a_database_that_is_away_is_told_at_once(tmp_path, monkeypatch):
    pytest.importorskip("psycopg2", reason="pip install '.[servers]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg2://user:canary@127.0.0.1:1/runs")
    with pytest.raises(TrackingAwayError, match=r"psycopg2://127.0.0.1:1/runs can't be reached") as caught:
        started("database")
    assert "canary" not in str(caught.value)
    mlflow.set_tracking_uri(None)


@pytest.mark.slow
def test_by_default_a_server_that_is_away_is_given_up_within_half_a_minute(door, monkeypatch):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    door.shut()
    began = time.monotonic()
    with pytest.raises(TrackingAwayError):
        started("default")
    assert 5 < time.monotonic() - began < 30


@pytest.mark.slow
def test_a_slow_server_is_waited_for(door, monkeypatch):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")  # a server drops connections that idle for 5 s
    door.delay_seconds = 5
    tracker = started("slow")
    began = time.monotonic()
    tracker.trial_changed(record := trial("a").longer(5.0))
    assert time.monotonic() - began < 0.5
    tracker.catch_up(60)
    door.delay_seconds = 0
    assert steps(tracker.run_id(record)) == [10]
    tracker.end("KILLED", {})
