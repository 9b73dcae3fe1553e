"""A host trains whoever asks, holds up nobody, and loses no trial to memory or to another trial's end."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_examples
from test_training import losses

import qlora.perplexity
import tuning.host
import tuning.shared_work
from qlora.checkpoint_files import MANIFEST, verify_checkpoint
from qlora.config import BaseModelSettings
from qlora.lora.bank import load_bank
from qlora.lora.peft_folder import AdapterFiles
from qlora.perplexity import adapter_perplexities, mean_perplexity
from qlora.provenance import hardware
from qlora.training import Training
from tuning.checkpoints import Storage
from tuning.examples import PromptedExamples, SweepExamples
from tuning.host import Host, SweepData
from tuning.space import Space

CONFIGS = [
    {"learning_rate": 0.01, "lora_r": 4},
    {"learning_rate": 0.003, "lora_r": 8},
    {"learning_rate": 0.02, "lora_r": 2, "epochs": "1+1"},
]


@pytest.fixture(autouse=True)
def threads():
    """A host sets its process's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tiny_base) -> SweepData:
    space = Space.model_validate(
        {
            "base_model": {"name": str(tiny_base), "quantization": "none"},
            "data": {"train": "t", "public": "p"},
            "trial": {"batch_size": 4, "lora_dropout": 0.1},
            "search": {"learning_rate": {"choice": [0.01]}},
            "scheduler": {"type": "asha", "grace_period": 50},
        }
    )
    train, public = random_examples(12, vocabulary=250), random_examples(5, seed=3, vocabulary=250)
    return SweepData(space, SweepExamples({"default": PromptedExamples(train, public)}), 10_000)


def run(
    host: Host, name: str, config: dict, folder: Path, checkpoint: str | None = None
) -> list[dict[str, float]]:
    """A trial as tuning.trial has it, without Ray."""
    found = []
    for step in host.attach(name, f"holder of {name}", config, checkpoint):
        target = folder / f"{name}-{step}"
        target.mkdir()
        found.append(host.advance(name, step, str(target)))
    host.detach(name)
    return found


def alone(data: SweepData, config: dict) -> tuple[list[float], float]:
    """(losses, last perplexity) of a trial without a host."""
    settings = data.space.trial_settings(config)
    training = Training(load_bank(data.space.base_model), data.examples.of({}).train, settings)
    found = losses(training, training.timetable.total_steps)
    return found, mean_perplexity(
        adapter_perplexities(training.bank, [(training.adapter, data.examples.of({}).public)], 10_000)[0]
    )


def test_trials_of_a_host_are_what_they_are_alone(data, tmp_path):
    host = Host(data, 1)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda number: run(host, f"t{number}", CONFIGS[number], tmp_path), range(3)))
    for points, config in zip(found, CONFIGS, strict=True):
        expected, perplexity = alone(data, config)
        assert points[-1]["public_perplexity"] == pytest.approx(perplexity, rel=1e-4)
        assert points[-1]["step"] == len(expected)
    assert host.zero_shot()["default"] == pytest.approx(
        adapter_perplexities(load_bank(data.space.base_model), [(None, data.examples.of({}).public)], 10_000)[
            0
        ],
        rel=1e-5,
    )


def test_a_host_knows_where_its_time_went(data, tmp_path):
    """It counts from the first trial's coming to the last one's end, and nothing of before and after."""
    host = Host(data, 1)
    host.zero_shot()
    assert sum(host.seconds().values()) == 0
    started = time.monotonic()
    points = run(host, "t", CONFIGS[0], tmp_path)
    whole, seconds = time.monotonic() - started, host.seconds()
    host.zero_shot()
    assert host.seconds() == seconds
    assert 0 < sum(seconds.values()) <= whole
    assert seconds["recording"] == 0  # there is no GPU to record on
    assert min(seconds["training"], seconds["evaluating"], seconds["waiting"]) > 0
    assert points


def test_trials_go_on_from_an_adapter(data, tmp_path):
    """Begins the trials of a sweep where those of another had come to."""
    before = run(Host(data, 1), "first", CONFIGS[0], tmp_path)[-1]
    folder = tmp_path / f"first-{before['step']}" / "adapter"
    start = AdapterFiles.read(folder)
    after = run(
        Host(replace(data, start=start), 1), "second", {"learning_rate": 1e-12, "lora_r": 4}, tmp_path
    )[0]
    assert after["public_perplexity"] == pytest.approx(before["public_perplexity"], rel=1e-5)


def test_out_of_memory_halves_the_passes_and_changes_nothing(data, tmp_path, monkeypatch):
    whole_step, tried = tuning.shared_work.advance_together, []

    def short_of_memory(trainings, budget_tokens):
        tried.append(budget_tokens)
        if budget_tokens > 400:
            raise torch.cuda.OutOfMemoryError("no room")
        return whole_step(trainings, budget_tokens)

    monkeypatch.setattr(tuning.shared_work, "advance_together", short_of_memory)
    points = run(Host(data, 1), "t", CONFIGS[0], tmp_path)
    assert tried[:6] == [10_000, 5000, 2500, 1250, 625, 312]
    assert points[-1]["public_perplexity"] == pytest.approx(alone(data, CONFIGS[0])[1], rel=1e-4)


def test_out_of_memory_in_the_smallest_passes_has_layers_computed_again(data, tmp_path, monkeypatch):
    whole_step, tried = tuning.shared_work.advance_together, []

    def short_of_memory(trainings, budget_tokens):
        tried.append(budget_tokens)
        if not trainings[0].bank.recomputes or budget_tokens > 5000:
            raise torch.cuda.OutOfMemoryError("no room")
        return whole_step(trainings, budget_tokens)

    monkeypatch.setattr(tuning.shared_work, "advance_together", short_of_memory)
    host = Host(data, 1)
    points = run(host, "t", CONFIGS[0], tmp_path)
    smallest = tried.index(min(tried))
    assert tried[smallest + 1 : smallest + 3] == [10_000, 5000]
    assert points[-1]["public_perplexity"] == pytest.approx(alone(data, CONFIGS[0])[1], rel=1e-4)
    assert sum("layers are computed again" in note for note in host.notes()) == 1


def test_texts_that_find_no_memory_have_no_layers_computed_again(data, monkeypatch):
    work = tuning.shared_work.SharedWork(data.space.base_model, 1000)

    class NoRoom:
        def values(self, *arguments):
            raise torch.cuda.OutOfMemoryError("no room")

    (found,) = work.judge(NoRoom(), [(None, data.examples.by_prompt)], lambda: False)
    assert isinstance(found, torch.cuda.OutOfMemoryError) and not work.bank.recomputes


def test_a_device_that_was_not_planned_for_does_as_the_smallest_that_was(data):
    planned = replace(data, budgets={"A": 100, "B": 50}, budget_tokens=50, recomputing=frozenset("B"))
    assert [planned.for_device(name) for name in "ABC"] == [(100, False), (50, True), (50, True)]


def test_a_plan_may_have_layers_computed_again_from_the_start(data, tmp_path):
    again = replace(data, recomputing=frozenset([hardware("cpu")]))
    host = Host(again, 1)
    points = run(host, "t", CONFIGS[0], tmp_path)
    assert points[-1]["public_perplexity"] == pytest.approx(alone(data, CONFIGS[0])[1], rel=1e-4)
    assert host.notes() == []


def test_a_trial_that_fits_nowhere_ends_alone(data, tmp_path, monkeypatch):
    """No pass is small enough for one of two trials: the other goes on."""
    whole_step = tuning.shared_work.advance_together

    def short_of_memory(trainings, budget_tokens):
        if any(training.settings.lora_r == 8 for training in trainings):
            raise torch.cuda.OutOfMemoryError("no room")
        return whole_step(trainings, budget_tokens)

    monkeypatch.setattr(tuning.shared_work, "advance_together", short_of_memory)
    host = Host(data, 1)
    with ThreadPoolExecutor(2) as pool:
        small = pool.submit(run, host, "small", CONFIGS[0], tmp_path)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            run(host, "large", CONFIGS[1], tmp_path)
        assert small.result()[-1]["public_perplexity"] == pytest.approx(alone(data, CONFIGS[0])[1], rel=1e-4)


@pytest.mark.parametrize("work", ["advance_together", "adapter_perplexities"])
def test_a_trial_whose_work_fails_in_company_is_the_only_one_to_fail(data, tmp_path, monkeypatch, work):
    """A kernel that does not compile for one rank fails every shared pass; others are tried without it."""
    whole, tried = getattr(tuning.shared_work, work), []

    def ranks_of(members) -> list[int]:
        if work == "advance_together":
            return [training.settings.lora_r for training in members]
        return [adapter.settings.lora_r for adapter, _ in members if adapter is not None]

    def without_rank_8(*arguments, **options):
        members = arguments[0] if work == "advance_together" else arguments[1]
        tried.append(ranks_of(members))
        if 8 in tried[-1]:
            raise RuntimeError("no kernel for rank 8")
        return whole(*arguments, **options)

    monkeypatch.setattr(tuning.shared_work, work, without_rank_8)
    host = Host(data, 1)
    steps = {name: host.attach(name, name, config) for name, config in (("a", CONFIGS[0]), ("b", CONFIGS[1]))}
    for name in "ab":
        (tmp_path / name).mkdir()
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(host.advance, "a", steps["a"][0], str(tmp_path / "a"))
        with pytest.raises(RuntimeError, match="no kernel for rank 8"):
            host.advance("b", steps["b"][0], str(tmp_path / "b"))
        assert good.result()["step"] == steps["a"][0]
    assert [8] in tried, "it was tried alone"
    assert host.attach("c", "c", CONFIGS[2]), "the host is there for others"


def test_a_host_outlives_a_failure_after_out_of_memory(data, tmp_path, monkeypatch):
    """Seats that are tried alone after out of memory may fail with anything else."""

    def failing(trainings, budget_tokens):
        if len(trainings) > 1:
            raise torch.cuda.OutOfMemoryError("no room")
        raise ZeroDivisionError("something else")

    whole = tuning.shared_work.advance_together
    monkeypatch.setattr(tuning.shared_work, "advance_together", failing)
    host = Host(data, 1)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, host, f"t{n}", CONFIGS[n], tmp_path) for n in range(2)]
        for one in runs:
            with pytest.raises(ZeroDivisionError):
                one.result()
    monkeypatch.setattr(tuning.shared_work, "advance_together", whole)
    (tmp_path / "later").mkdir()
    assert run(host, "later", CONFIGS[0], tmp_path / "later")[-1]["schedule_percent"] == 100


def test_a_host_outlives_a_failure_of_its_own_turn(data, tmp_path, monkeypatch):
    """Whatever goes wrong in the thread itself is told to whoever waits, and the next call is answered."""
    host = Host(data, 1)

    def broken(seats):
        monkeypatch.undo()
        raise MemoryError("in the turn itself")

    monkeypatch.setattr(host, "_train", broken)
    with pytest.raises(MemoryError):
        run(host, "t", CONFIGS[0], tmp_path)
    (tmp_path / "later").mkdir()
    assert run(host, "t", CONFIGS[0], tmp_path / "later")[-1]["schedule_percent"] == 100


def test_out_of_memory_in_an_evaluation_shrinks_its_passes(data, tmp_path, monkeypatch):
    """Keeps what is scored, and lets the rest through in smaller passes; the host says so."""
    whole, tried = qlora.perplexity.run_pass, []

    def short_of_memory(bank, groups, *arguments, **options):
        tokens = sum(group.num_tokens for group in groups)
        tried.append(tokens)
        if tokens > 400:
            raise torch.cuda.OutOfMemoryError("no room")
        return whole(bank, groups, *arguments, **options)

    longer = replace(data.examples.of({}), public=random_examples(40, seed=3, vocabulary=250))
    data = replace(data, examples=SweepExamples({"default": longer}))
    expected = Host(data, 1).zero_shot()["default"]
    monkeypatch.setattr(qlora.perplexity, "run_pass", short_of_memory)
    host = Host(data, 1)
    assert host.zero_shot()["default"] == pytest.approx(expected, rel=1e-5)
    assert max(tried) > 400 >= tried[-1]
    assert any("out of memory: passes of" in note for note in host.notes())
    (tmp_path / "t").mkdir()
    points = run(host, "t", CONFIGS[0], tmp_path / "t")
    assert any("out of memory" in note for note in points[-1]["host_notes"]), (
        "trials hand it on to the screen"
    )


def test_an_evaluation_that_never_fits_fails(data, monkeypatch):
    """Passes shrink once down to the smallest; a host that then went on would never answer."""

    def no_room(*arguments, **options):
        raise torch.cuda.OutOfMemoryError("no room at all")

    host = Host(data, 1)
    monkeypatch.setattr(qlora.perplexity, "run_pass", no_room)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        host.zero_shot()
    monkeypatch.undo()
    assert len(host.zero_shot()["default"]) == len(data.examples.of({}).public)


def test_a_trial_is_answered_when_its_report_fails(data, tmp_path, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("in a trial's metrics")

    monkeypatch.setattr(tuning.host, "point_of", broken)
    host = Host(data, 1)
    with pytest.raises(ZeroDivisionError):
        run(host, "t", CONFIGS[0], tmp_path)
    monkeypatch.undo()
    (tmp_path / "later").mkdir()
    assert run(host, "t", CONFIGS[0], tmp_path / "later")[-1]["schedule_percent"] == 100


def test_a_full_disk_is_one_trials_failure(data, tmp_path, monkeypatch):
    whole_write = tuning.host.CheckpointContent.write

    def full(content, folder):
        if "first" in str(folder):
            raise OSError("no space left on device")
        whole_write(content, folder)

    monkeypatch.setattr(tuning.host.CheckpointContent, "write", full)
    host = Host(data, 1)
    with ThreadPoolExecutor(2) as pool:
        first, second = (
            pool.submit(run, host, "first", CONFIGS[0], tmp_path),
            pool.submit(run, host, "second", CONFIGS[0], tmp_path),
        )
        with pytest.raises(OSError, match="no space"):
            first.result()
        assert second.result()[-1]["schedule_percent"] == 100


def test_a_failing_trial_ends_alone(data, tmp_path):
    host = Host(data, 1)
    with ThreadPoolExecutor(2) as pool:
        sound = pool.submit(run, host, "sound", CONFIGS[1], tmp_path)
        with pytest.raises(Exception, match="diverged"):
            run(host, "broken", {"learning_rate": 1.0, "max_grad_norm": 1e30, "lora_alpha": 1e30}, tmp_path)
        assert sound.result()[-1]["public_perplexity"] == pytest.approx(alone(data, CONFIGS[1])[1], rel=1e-4)


def test_a_trial_goes_on_from_a_checkpoint(data, tmp_path):
    whole = run(Host(data, 1), "whole", CONFIGS[2], tmp_path)
    first = Host(data, 1)
    steps = first.attach("t", "holder", CONFIGS[2])
    first.advance("t", steps[0], str(tmp_path))
    rest = run(Host(data, 1), "again", CONFIGS[2], tmp_path, str(tmp_path))
    assert [point["step"] for point in rest] == steps[1:]
    assert rest[-1]["public_perplexity"] == pytest.approx(whole[-1]["public_perplexity"], rel=1e-5)


def test_a_stopped_host_keeps_where_its_trials_stand(data, tmp_path):
    """Between two reports, too; a trial that goes on from there reports what it would have reported."""
    long = {**CONFIGS[1], "epochs": 40}  # at a rate that does not multiply roundings
    whole = run(Host(data, 1), "whole", long, tmp_path)
    first, storage = Host(data, 1), Storage.at(str(tmp_path))
    last = first.attach("t", "holder", long)[-1]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(first.advance, "t", last, str(tmp_path / "report"))
        try:
            while not first._seats["t"].work.seen:
                time.sleep(0.001)
            assert first.stop(storage) == 1
        finally:
            first.detach("t")
        assert isinstance(asked.exception(), RuntimeError)
    stopped = tmp_path / "t" / "checkpoint_stopped"
    verify_checkpoint(stopped)
    again = Host(data, 1)
    assert again.attach("t", "holder", long, str(stopped))[-1] == last
    (tmp_path / "again").mkdir()
    found = again.advance("t", last, str(tmp_path / "again"))
    assert found["training_loss"] == pytest.approx(mean_loss(whole), rel=1e-5)
    assert found["public_perplexity"] == pytest.approx(whole[-1]["public_perplexity"], rel=1e-5)


@pytest.mark.parametrize("which", [0, -1])
def test_a_trial_that_was_stopped_just_before_its_evaluation_is_evaluated_first(data, tmp_path, which):
    """At its first report and at its last: no point of its curve is missing."""
    whole = run(Host(data, 1), "whole", CONFIGS[2], tmp_path)
    first, storage = Host(data, 1), Storage.at(str(tmp_path))
    steps = first.attach("t", "holder", CONFIGS[2])
    goal = steps[which]
    train = first._work.train

    with ThreadPoolExecutor(2) as pool:

        def train_and_be_stopped(works):
            errors = train(works)
            if works[0].training.step == goal:
                pool.submit(first.stop, storage)
                while not first._calls:
                    time.sleep(0.001)
            return errors

        first._work.train = train_and_be_stopped
        (tmp_path / "report").mkdir()
        asked = pool.submit(first.advance, "t", goal, str(tmp_path / "report"))
        stopped = tmp_path / "t" / "checkpoint_stopped"
        while not (stopped / MANIFEST).exists() and not asked.done():
            time.sleep(0.001)
        first.detach("t")
        assert isinstance(asked.exception(), RuntimeError)
    again = Host(data, 1)
    left = again.attach("t", "holder", CONFIGS[2], str(stopped))
    assert left == [step for step in steps if step >= goal]
    (tmp_path / "again").mkdir()
    found = again.advance("t", left[0], str(tmp_path / "again"))
    assert found["step"] == goal
    assert found["public_perplexity"] == pytest.approx(
        next(point["public_perplexity"] for point in whole if point["step"] == goal), rel=1e-5
    )


def mean_loss(curve: list[dict]) -> float:
    """The mean training loss over all steps of a curve, whose points have that since the point before."""
    starts = [0, *(point["step"] for point in curve)]
    loss = sum(
        point["training_loss"] * (point["step"] - start) for start, point in zip(starts, curve, strict=False)
    )
    return loss / curve[-1]["step"]


def test_a_holder_from_before_takes_no_seat_from_the_next_one(data, tmp_path):
    """As the process of a trial that was paused, which hears of that when another has gone on with it."""
    host = Host(data, 1)
    host.attach("trial", "first process", CONFIGS[0])
    steps = host.attach("trial", "second process", CONFIGS[0])
    host.detach("trial", "first process")
    assert host.advance("trial", steps[0], str(tmp_path))["step"] == steps[0]
    host.detach("trial", "second process")
    with pytest.raises(KeyError):
        host.advance("trial", steps[-1], str(tmp_path))


def test_a_seat_is_given_up_when_its_holder_takes_another(data, tmp_path):
    host = Host(data, 1)
    host.attach("old", "same holder", CONFIGS[0])
    reply: list[Exception] = []

    def advance() -> None:
        try:
            host.advance("old", 10**9, str(tmp_path))
        except RuntimeError as error:
            reply.append(error)

    waiting = threading.Thread(target=advance)
    waiting.start()
    host.attach("new", "same holder", CONFIGS[1])
    waiting.join(timeout=60)
    assert "detached" in str(reply[0]) or "schedule" in str(reply[0])
    with pytest.raises(KeyError):
        host.advance("old", 1, str(tmp_path))


def test_a_bank_holds_the_nf4_values(tiny_base):
    """Has trials train against what is served: the quantised values, dequantised once."""
    settings = BaseModelSettings(name=str(tiny_base))
    dense = dict(load_bank(settings).model.named_parameters())
    plain = dict(load_bank(settings.model_copy(update={"quantization": "none"})).model.named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    assert dense[name].dtype == torch.float32
    assert len(dense[name].unique()) < len(plain[name].unique())
