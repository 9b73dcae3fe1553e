"""What GPUs cost is told: GPU-seconds and, with a price, money, planned and measured."""

import json
import re
from dataclasses import replace

import pytest
from conftest import CONFIGS, random_examples, write_course
from test_budget import SPACE

import tuning.spending
import workflows.sweep.cost
from inference.engine import ServedModel
from inference.job import Progress, open_job, run_job
from inference.pipeline import Pool, Work
from qlora.config import BaseModelSettings, DecodingSettings
from qlora.cost import Cost, Costs
from qlora.data.prompts import load_prompt
from tuning.device import Device
from tuning.model_size import model_size
from tuning.plan_text import describe_plan, describe_range
from tuning.space import Space
from tuning.spending import SpendingClock, Spent, spent_so_far
from tuning.strategy import Budget
from tuning.sweep_plan import make_sweep_plan
from workflows.batch_summary import closing_words as batch_words
from workflows.sweep.closing import cost_lines
from workflows.sweep.cost import HeldDevices, cost_summary, costs_of

WORDS = {"train": "instruction + output", "public": "instruction + output"}
TRAIN, PUBLIC = random_examples(12), random_examples(5, seed=3)


def test_money_is_the_price_of_an_hour_times_the_hours():
    costs = Costs(Cost(5400, 3.0), Cost(3600, 3.0))
    assert (costs.measured.money, costs.planned.money) == (4.5, 3.0)
    assert costs.lines == {
        "cost": "5400 GPU-seconds, 3600 planned",
        "money": "4.50, 3.00 planned, at 3 a card and hour",
    }
    assert costs.figures == {
        "gpu_seconds": 5400, "planned_gpu_seconds": 3600, "money": 4.5, "planned_money": 3,
    }  # fmt: skip
    assert costs.metrics == {f"cost/{name}": value for name, value in costs.figures.items()}
    assert Costs(Cost(20, 3.0), Cost(9, 3.0)).lines["money"].startswith("0.017, 0.0075 planned")


def test_without_a_price_no_money_is_told():
    costs = Costs(Cost(5400), Cost(3600))
    assert list(costs.lines) == ["cost"]
    assert list(costs.figures) == ["gpu_seconds", "planned_gpu_seconds"]


@pytest.mark.parametrize("price", [None, 2.5])
def test_a_plan_says_what_its_gpus_will_cost(price):
    space = Space.model_validate({**SPACE, "trials_per_gpu": 2, "price_per_gpu_hour": price})
    devices = [Device("cuda", 80 << 30, 1e14, name="A")] * 2
    plan = make_sweep_plan(space, TRAIN, PUBLIC, model_size(CONFIGS["llama"]), devices, 2)
    words = describe_plan(space, TRAIN, PUBLIC, WORDS, plan)
    told = re.search(r"^cost        about (\d+) GPU-seconds, (\d+) if nothing is stopped", words, re.M)
    assert told and int(told[1]) == round(2 * plan.seconds) <= int(told[2])
    money = re.search(r"^money       about ([\d.]+) at 2.5 a card and hour, ([\d.]+) if nothing", words, re.M)
    assert bool(money) == bool(price)
    if money:
        assert float(money[1]) == pytest.approx(2 * plan.seconds * 2.5 / 3600, rel=0.05)
    of_a_range = describe_range(space, TRAIN, PUBLIC, WORDS, plan, plan, price)
    assert re.search(
        r"^cost        \d+ to \d+ GPU-seconds; up to \d+ if nothing is stopped", of_a_range, re.M
    )


def test_a_sweep_on_cpus_costs_no_gpu():
    space = Space.model_validate({**SPACE, "price_per_gpu_hour": 2.5})
    plan = make_sweep_plan(
        space, TRAIN, PUBLIC, model_size(CONFIGS["llama"]), [Device("cpu", 8 << 30, 1e11)], 1
    )
    assert not re.search("^(cost|money)", describe_plan(space, TRAIN, PUBLIC, WORDS, plan), re.M)
    assert cost_summary(costs_of(space, Spent(10, 10), 20)) is None
    assert cost_lines({"cost": None}) == cost_lines({}) == {}


def test_all_of_a_sweeps_sittings_count_and_what_is_around_its_trials(tmp_path, monkeypatch):
    now = [0.0]
    for module in (tuning.spending, workflows.sweep.cost):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def trials(seconds: float) -> None:
        clock = SpendingClock(Budget(gpu_seconds=1000), tmp_path, 2, lambda trial_ids: 2)
        clock.count(["a"])
        now[0] += seconds
        clock.count(["a"])
        clock.keep()

    held = HeldDevices(tmp_path, since=now[0])
    now[0] += 10  # hosts load
    held.count(2)
    trials(20)  # and the sweep is killed
    now[0] += 500
    held = HeldDevices(tmp_path, since=now[0])
    now[0] += 10
    held.count(2)
    trials(30)
    held.begin()
    now[0] += 4  # averages
    held.count(2)
    now[0] += 3  # the proof, on one of them
    assert held.count(1) == spent_so_far(tmp_path) == Spent(50, 100, False, 20 + 20 + 8 + 3)
    space = Space.model_validate({**SPACE, "trials_per_gpu": 2, "price_per_gpu_hour": 3.6})
    costs = costs_of(space, spent_so_far(tmp_path), 120)
    assert costs == Costs(Cost(151, 3.6), Cost(120, 3.6))
    summary = {"cost": json.loads(json.dumps(cost_summary(costs)))}
    assert cost_lines(summary) == costs.lines
    assert cost_lines(summary)["money"] == "0.15, 0.12 planned, at 3.6 a card and hour"


def test_progress_says_what_a_job_will_have_cost():
    plain = Progress(10, 100, 40, 5.0)
    assert str(plain).endswith("tokens/s, 15 s left")
    told = str(Progress(10, 100, 40, 5.0, Cost(36, 5.0)))
    assert told.endswith("tokens/s, 15 s left, 36 GPU-seconds (0.05) in all")


@pytest.mark.ray
def test_a_batch_job_says_what_its_gpus_cost(tiny_base, tmp_path, monkeypatch):
    """Ray is told of a GPU; the engine on it makes do with a CPU."""
    import ray

    write_course(tmp_path)
    source = next(tmp_path.rglob("public*.json"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    served = ServedModel(BaseModelSettings(name=str(tiny_base), quantization="none"), None)
    prompt = load_prompt()
    work = Work(served, prompt, DecodingSettings(num_beams=1, max_new_tokens=4), 2000)
    seen: list[Progress] = []

    def plan() -> Pool:
        ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
        return Pool(1, on_gpu=True)

    output = tmp_path / "out.json"
    try:
        with open_job(str(source), output) as rows:
            result = run_job(
                work, rows, output, {}, plan, resume=False, progress=seen.append, price_per_gpu_hour=36.0
            )
    finally:
        ray.shutdown()
    meta = json.loads((tmp_path / "out.json.meta.json").read_text())
    found = meta["cost"]
    assert found["money"] == pytest.approx(found["gpu_seconds"] / 100, abs=1e-5)
    assert 0 < found["gpu_seconds"] <= meta["seconds"]
    assert found["planned_gpu_seconds"] == pytest.approx(seen[0].expected.gpu_seconds, abs=1e-5)
    assert found["price_per_gpu_hour"] == 36
    words = batch_words(result, "out.json")
    assert re.search(
        r"^cost: \d+ GPU-seconds, \d+ planned; money: [\d.]+, [\d.]+ planned, at 36 a", words, re.M
    )
    without = batch_words(replace(result, costs=None), "out.json")
    assert "cost:" not in without
