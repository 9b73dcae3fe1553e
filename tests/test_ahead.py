"""Trials train on while their reports are on the way, and what nobody asks for then is forgotten."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import test_host
from test_host import CONFIGS, run

import tuning.host
import tuning.shared_work
from qlora.checkpoint import CheckpointContent
from qlora.checkpoint_files import read_position
from tuning.checkpoints import Storage
from tuning.host import Host
from tuning.orders import SET_ASIDE

data, threads = test_host.data, test_host.threads


@pytest.fixture
def goes_ahead(monkeypatch):
    """Trials train on while their reports are on the way, as on a GPU."""
    monkeypatch.setattr(tuning.host, "_GOES_AHEAD", {"cpu": True, "cuda": True})


def steps_taken(monkeypatch) -> list[tuple[int, int]]:
    """Return a list to which the rank and the step of each training that takes one are added."""
    whole, taken = tuning.shared_work.advance_together, []

    def watched(trainings, budget_tokens):
        taken.extend((training.settings.lora_r, training.step) for training in trainings)
        return whole(trainings, budget_tokens)

    monkeypatch.setattr(tuning.shared_work, "advance_together", watched)
    return taken


def until(is_so) -> None:
    deadline = time.monotonic() + 20
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_so()


def test_a_trial_trains_on_while_its_report_is_on_the_way(data, tmp_path, monkeypatch, goes_ahead):
    """Up to its next evaluation, each step once; its points and checkpoints are those of the steps asked."""
    taken, (rank, config) = steps_taken(monkeypatch), (CONFIGS[0]["lora_r"], CONFIGS[0])
    expected = run(Host(data, 1), "waits", config, tmp_path)
    host = Host(data, 1)
    taken.clear()
    first, *_, last = host.attach("t", "h", config)
    points = []
    for step in [point["step"] for point in expected]:
        folder = tmp_path / f"t-{step}"
        folder.mkdir()
        points.append(host.advance("t", step, str(folder)))
        come_to = min(last, step + first)
        until(lambda count=come_to: len(taken) == count)
        assert read_position((folder / "position.json").read_bytes())["step"] == step
    assert taken == [(rank, step) for step in range(last)]
    for point, other in zip(points, expected, strict=True):
        assert point["public_perplexity"] == pytest.approx(other["public_perplexity"], rel=1e-4)
        assert point["training_loss"] == pytest.approx(other["training_loss"], rel=1e-4)


def test_a_checkpoint_is_not_changed_by_what_is_trained_meanwhile(data, tmp_path, monkeypatch, goes_ahead):
    """It goes on exactly from the step of its report, also if the trial was ahead when it was taken down."""
    expected = run(Host(data, 1), "whole", CONFIGS[0], tmp_path)
    write, may_be_written = CheckpointContent.write, threading.Event()

    def slow(content, folder, notes=None):
        may_be_written.wait(20)
        write(content, folder, notes)

    monkeypatch.setattr(CheckpointContent, "write", slow)
    host, folder = Host(data, 1), tmp_path / "report"
    folder.mkdir()
    first, *others = host.attach("t", "h", CONFIGS[0])
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(host.advance, "t", first, str(folder))
        until(lambda: host._seats["t"].work.training.step > first)
        may_be_written.set()
        assert reply.result()["step"] == first
    host.detach("t")
    points = run(Host(data, 1), "t", CONFIGS[0], tmp_path, str(folder))
    assert [point["step"] for point in points] == others
    for point, other in zip(points, expected[1:], strict=True):
        assert point["public_perplexity"] == pytest.approx(other["public_perplexity"], rel=1e-4)


def test_no_trial_trains_on_where_others_are_asked_to(data, tmp_path, monkeypatch, goes_ahead):
    """Leaves what may be thrown away out of the passes of what is asked for."""
    taken, host = steps_taken(monkeypatch), Host(data, 1)
    steps = {name: host.attach(name, name, config) for name, config in (("a", CONFIGS[0]), ("b", CONFIGS[1]))}
    with ThreadPoolExecutor(2) as pool:
        (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
        long = pool.submit(host.advance, "b", steps["b"][-1], str(tmp_path / "b"))
        host.advance("a", steps["a"][0], str(tmp_path / "a"))
        long.result()
    before = [number for number, one in enumerate(taken) if one == (CONFIGS[1]["lora_r"], steps["b"][-1] - 1)]
    ahead = [number for number, one in enumerate(taken) if one == (CONFIGS[0]["lora_r"], steps["a"][0])]
    assert len(before) == 1 and all(number > before[0] for number in ahead)


def test_a_trial_that_fails_ahead_fails_when_it_is_asked(data, tmp_path, monkeypatch, goes_ahead):
    whole, failed = tuning.shared_work.advance_together, []

    def failing(trainings, budget_tokens):
        if trainings[0].step >= first:
            failed.append(trainings[0].step)
            raise ZeroDivisionError("in a step that nobody asked for yet")
        return whole(trainings, budget_tokens)

    monkeypatch.setattr(tuning.shared_work, "advance_together", failing)
    host = Host(data, 1)
    first, second, *_ = host.attach("t", "h", CONFIGS[0])
    assert host.advance("t", first, str(tmp_path))["step"] == first
    until(lambda: failed)
    with pytest.raises(ZeroDivisionError):
        host.advance("t", second, str(tmp_path))
    assert failed == [first, first], "once ahead, once when it was asked for"


def test_who_is_ahead_leaves_as_one_who_waits(data, tmp_path, monkeypatch, goes_ahead):
    """Set aside, ended by hand or stopped it goes on, if at all, from its report: nothing else is kept."""
    taken, storage = steps_taken(monkeypatch), Storage.at(str(tmp_path / "ray"))
    leaves = {
        "aside": (lambda host: host.set_aside("aside", storage), {SET_ASIDE: False}),
        "by hand": (lambda host: host.end("by hand"), {"by_hand": True}),
    }
    for name, (leave, answer) in leaves.items():
        host, folder = Host(data, 1), tmp_path / name
        folder.mkdir()
        first, second, *_ = host.attach(name, "h", CONFIGS[2])
        host.advance(name, first, str(folder))
        until(lambda here=host, who=name, step=first: here._seats[who].work.training.step > step)
        leave(host)
        assert host.advance(name, second, str(folder)) == answer
        count = len(taken)
        host.zero_shot()
        assert len(taken) == count, "it trains no more"
    host = Host(data, 1)
    first, *_ = host.attach("stopped", "h", CONFIGS[2])
    (tmp_path / "stopped").mkdir()
    host.advance("stopped", first, str(tmp_path / "stopped"))
    until(lambda: host._seats["stopped"].work.training.step > first)
    assert host.stop(storage) == 0
    assert storage.trial_folders() == {}
