"""What GPUs cost is told: GPU-seconds and, with a price, money, planned and measured."""

import html
import json
import re
import time
from dataclasses import replace
from typing import Any

import pytest
from conftest import CONFIGS, command, finished, random_examples, write_course
from test_budget import SPACE

import qlora.cost
from inference.books import Progress
from inference.engine import ServedModel
from inference.job import JobResult, open_job, run_job
from inference.pipeline import Pool, Work
from qlora.config import BaseModelSettings, DecodingSettings
from qlora.cost import Cost, Costs, HeldGpus, in_money
from qlora.data.prompts import load_prompt
from tuning.device import Device
from tuning.model_size import model_size
from tuning.plan_text import describe_plan, describe_range
from tuning.plan_time import START_SECONDS
from tuning.space import Space
from tuning.sweep_plan import make_sweep_plan
from workflows.batch_summary import closing_words as batch_words
from workflows.sweep.closing import cost_lines
from workflows.sweep.cost import cost_summary

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


def test_a_sweep_that_stops_nothing_says_nothing_of_stopping():
    devices = [Device("cuda", 80 << 30, 1e14, name="A")]
    for kind, clauses in (("asha", 3), ("fifo", 0)):
        changes = {"trials_per_gpu": 1, "price_per_gpu_hour": 2.5, "scheduler": {"type": kind}}
        space = Space.model_validate({**SPACE, **changes})
        plan = make_sweep_plan(space, TRAIN, PUBLIC, model_size(CONFIGS["llama"]), devices, 1)
        of_a_range = describe_range(space, TRAIN, PUBLIC, WORDS, plan, plan, 2.5)
        for words in (describe_plan(space, TRAIN, PUBLIC, WORDS, plan), of_a_range):
            assert words.count("if nothing is stopped") == clauses


def test_a_sweep_on_cpus_costs_no_gpu():
    space = Space.model_validate({**SPACE, "price_per_gpu_hour": 2.5})
    plan = make_sweep_plan(
        space, TRAIN, PUBLIC, model_size(CONFIGS["llama"]), [Device("cpu", 8 << 30, 1e11)], 1
    )
    assert not re.search("^(cost|money)", describe_plan(space, TRAIN, PUBLIC, WORDS, plan), re.M)
    assert cost_summary(None) is None
    assert cost_lines({"cost": None}) == cost_lines({}) == {}


def test_all_sittings_count_and_the_first_plan_stays(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(qlora.cost.time, "monotonic", lambda: now[0])

    def sitting() -> HeldGpus:
        return HeldGpus(tmp_path / "held.json", now[0], 2)

    held = sitting()
    now[0] += 10  # on two, as at first
    held.count()
    held.plan(120)
    now[0] += 6
    held.count(3)  # one has joined
    now[0] += 1  # less than between two writes: a kill here loses it
    held.count()
    assert held.gpu_seconds == 20 + 18 + 3
    now[0] += 500  # nothing runs
    held = sitting()
    assert held.gpu_seconds == 38
    held.plan(7)
    now[0] += 4
    held.count(1)
    held.keep()
    found = sitting().costs(3.6)
    assert found == Costs(Cost(42, 3.6), Cost(120, 3.6))
    summary = {"cost": json.loads(json.dumps(cost_summary(found)))}
    assert cost_lines(summary) == found.lines
    assert cost_lines(summary)["money"] == "0.042, 0.12 planned, at 3.6 a card and hour"


@pytest.mark.parametrize("content", ["{", "[]", '{"gpu_seconds": "much"}', '{"gpu_seconds": null}'])
def test_a_damaged_file_of_what_was_held_begins_anew(tmp_path, content):
    (tmp_path / "held.json").write_text(content)
    assert HeldGpus(tmp_path / "held.json", 0.0, 1).gpu_seconds == 0


def test_nothing_held_or_nothing_expected_is_no_cost(tmp_path):
    assert HeldGpus(tmp_path / "held.json", time.monotonic(), 0).costs(1.0) is None
    held = HeldGpus(tmp_path / "held.json", time.monotonic() - 5, 1)
    held.count()
    assert held.costs(1.0) is None


def test_a_budget_ends_the_plan_of_a_sweep_too():
    size, devices = model_size(CONFIGS["llama"]), [Device("cuda", 80 << 30, 1e7, name="slow")] * 2
    long = Space.model_validate({**SPACE, "trials_per_gpu": 2})
    short = Space.model_validate({**SPACE, "trials_per_gpu": 2, "budget": {"gpu_seconds": 10, "minutes": 9}})
    plan, cut = (make_sweep_plan(space, TRAIN, PUBLIC, size, devices, 2) for space in (long, short))
    assert plan.seconds > cut.seconds == cut.seconds_without_stopping == START_SECONDS + 10 / 2
    assert cut.gpu_seconds == 2 * cut.seconds


def test_small_amounts_are_told_with_two_digits_that_count():
    amounts = (0.0, 1e-9, 0.00012345, 0.012345, 0.12345, 12.345)
    assert [*map(in_money, amounts)] == ["0.00", "0.00", "0.00012", "0.012", "0.12", "12.35"]


@pytest.mark.ray
def test_a_sweep_says_what_its_gpus_cost(project, monkeypatch):
    """On a Ray that is told of a GPU, whose host makes do with a CPU."""
    from mlflow import MlflowClient
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # Ray checks what its nodes claim to have
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1})
    changes = ("trials_per_gpu=2", "num_samples=2", "search.epochs={choice: [1]}", "price_per_gpu_hour=36")
    options = [word for change in changes for word in ("--set", change)]
    began = time.monotonic()
    try:
        env = {"RAY_ADDRESS": cluster.address, "PYTHONPATH": ""}
        out = finished(command(project, "tune", "--space", "space.yaml", "--name", "dear", *options, env=env))
    finally:
        cluster.shutdown()
    wall = time.monotonic() - began
    summary = json.loads((project / "results/dear/summary.json").read_text())
    cost = summary["cost"]
    assert 0 < summary["spent"]["gpu_seconds"] < cost["gpu_seconds"] < wall
    assert cost["money"] == pytest.approx(cost["gpu_seconds"] / 100, abs=1e-5)
    lines = cost_lines(summary)
    assert all(f"{name:<11} {line}" in out for name, line in lines.items())
    assert [*lines] == ["cost", "money"]
    planned = re.findall(r"^cost        about (\d+) GPU-seconds", out, re.M)
    assert round(cost["planned_gpu_seconds"]) == int(planned[-1])
    assert html.escape(lines["money"]) in (project / "results/dear/report.html").read_text()
    run = MlflowClient(f"sqlite:///{project}/mlruns/mlflow.db").get_run(summary["mlflow_run_id"])
    told = {name: value for name, value in run.data.metrics.items() if name.startswith("cost/")}
    figures = ("gpu_seconds", "planned_gpu_seconds", "money", "planned_money")
    assert told == {f"cost/{name}": cost[name] for name in figures}


def test_progress_says_what_a_job_will_have_cost():
    plain = Progress(10, 100, 40, 5.0)
    assert str(plain).endswith("tokens/s, 15 s left")
    told = str(Progress(10, 100, 40, 5.0, Cost(36, 5.0)))
    assert told.endswith("tokens/s, 15 s left, 36 GPU-seconds (0.050 at 5 a card and hour) in all")


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

    def job(resume: bool, record: Any) -> JobResult:
        with open_job(str(source), output) as rows:
            return run_job(
                work, rows, output, {}, plan, resume=resume, progress=seen.append, record=record,
                price_per_gpu_hour=36.0,
            )  # fmt: skip

    def server_is_away(job_id: str, result: JobResult) -> None:
        raise ConnectionError

    output = tmp_path / "out.json"
    try:
        with pytest.raises(ConnectionError):
            job(False, server_is_away)
    finally:
        ray.shutdown()
    before = json.loads((tmp_path / "out.json.meta.json").read_text())
    result = job(True, lambda job_id, result: None)
    meta = json.loads((tmp_path / "out.json.meta.json").read_text())
    found = meta["cost"]
    assert found["money"] == pytest.approx(found["gpu_seconds"] / 100, abs=1e-5)
    assert 0 < found["gpu_seconds"] <= before["seconds"]
    assert found == before["cost"], "what was lacking was its record alone"
    assert found["planned_gpu_seconds"] == pytest.approx(seen[0].expected.gpu_seconds, abs=1e-5)
    assert found["price_per_gpu_hour"] == 36
    words = batch_words(result, "out.json")
    assert re.search(
        r"^cost: \d+ GPU-seconds, \d+ planned; money: [\d.]+, [\d.]+ planned, at 36 a", words, re.M
    )
    without = batch_words(replace(result, costs=None), "out.json")
    assert "cost:" not in without
