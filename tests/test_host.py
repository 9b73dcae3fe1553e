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

import tuning.host
import tuning.shared_work
from qlora.checkpoint import verify_checkpoint
from qlora.config import BaseModelSettings
from qlora.lora.bank import load_bank
from qlora.lora.peft_folder import AdapterFiles
from qlora.perplexity import adapter_perplexities, mean_perplexity
from qlora.training import Training
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
    return SweepData(
        space, random_examples(12, vocabulary=250), random_examples(5, seed=3, vocabulary=250), 10_000
    )


def run(
    host: Host, name: str, config: dict, folder: Path, checkpoints: tuple[str, ...] = ()
) -> list[dict[str, float]]:
    """A trial as tuning.trial has it, without Ray."""
    found = []
    for step in host.attach(name, f"holder of {name}", config, checkpoints):
        target = folder / f"{name}-{step}"
        target.mkdir()
        found.append(host.advance(name, step, str(target)))
    host.detach(name)
    return found


def alone(data: SweepData, config: dict) -> tuple[list[float], float]:
    """(losses, last perplexity) of a trial without a host."""
    settings = data.space.trial_settings(config)
    training = Training(load_bank(data.space.base_model), data.train, settings)
    found = losses(training, training.timetable.total_steps)
    return found, mean_perplexity(
        adapter_perplexities(training.bank, [(training.adapter, data.public)], 10_000)[0]
    )


def test_trials_of_a_host_are_what_they_are_alone(data, tmp_path):
    host = Host(data, 1)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda number: run(host, f"t{number}", CONFIGS[number], tmp_path), range(3)))
    for points, config in zip(found, CONFIGS, strict=True):
        expected, perplexity = alone(data, config)
        assert points[-1]["public_perplexity"] == pytest.approx(perplexity, rel=1e-4)
        assert points[-1]["step"] == len(expected)
    assert host.zero_shot() == pytest.approx(
        adapter_perplexities(load_bank(data.space.base_model), [(None, data.public)], 10_000)[0], rel=1e-5
    )


def test_a_host_knows_where_its_time_went(data, tmp_path):
    """All of it from the first trial's coming to the last one's end, and nothing of before and after."""
    host = Host(data, 1)
    time.sleep(0.5)
    assert sum(host.seconds().values()) == 0
    started = time.monotonic()
    points = run(host, "t", CONFIGS[0], tmp_path)
    whole, seconds = time.monotonic() - started, host.seconds()
    time.sleep(0.5)
    assert host.seconds() == seconds
    assert sum(seconds.values()) == pytest.approx(whole, rel=0.2)
    assert seconds["recording"] == 0  # there is no GPU to record on
    assert min(seconds["training"], seconds["evaluating"], seconds["waiting"]) > 0
    assert points


def test_trials_go_on_from_an_adapter(data, tmp_path):
    """What was reached by one sweep is where the trials of the next begin."""
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


def test_a_trial_goes_on_from_its_newest_whole_checkpoint(data, tmp_path):
    whole = run(Host(data, 1), "whole", CONFIGS[2], tmp_path)
    first = Host(data, 1)
    steps = first.attach("t", "holder", CONFIGS[2], ())
    for step in steps[:2]:
        (tmp_path / f"t-{step}").mkdir()
        first.advance("t", step, str(tmp_path / f"t-{step}"))
    good, damaged = (tmp_path / f"t-{step}" for step in steps[:2])
    verify_checkpoint(damaged)
    (damaged / "position.json").write_text("{}")
    rest = run(Host(data, 1), "again", CONFIGS[2], tmp_path, (str(damaged), str(good)))
    assert [point["step"] for point in rest] == steps[1:]
    assert rest[-1]["public_perplexity"] == pytest.approx(whole[-1]["public_perplexity"], rel=1e-5)


def test_a_seat_is_given_up_when_its_holder_takes_another(data, tmp_path):
    host = Host(data, 1)
    host.attach("old", "same holder", CONFIGS[0], ())
    reply: list[Exception] = []

    def advance() -> None:
        try:
            host.advance("old", 10**9, str(tmp_path))
        except RuntimeError as error:
            reply.append(error)

    waiting = threading.Thread(target=advance)
    waiting.start()
    host.attach("new", "same holder", CONFIGS[1], ())
    waiting.join(timeout=60)
    assert "detached" in str(reply[0]) or "schedule" in str(reply[0])
    with pytest.raises(KeyError):
        host.advance("old", 1, str(tmp_path))


def test_a_bank_holds_the_nf4_values(tiny_base):
    """What trials train against is what is served: the quantised values, dequantised once."""
    settings = BaseModelSettings(name=str(tiny_base))
    dense = dict(load_bank(settings).model.named_parameters())
    plain = dict(load_bank(settings.model_copy(update={"quantization": "none"})).model.named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    assert dense[name].dtype == torch.float32
    assert len(dense[name].unique()) < len(plain[name].unique())
