"""What trials are compared by: figures of texts that adapters write, and functions of people's own."""

import json
import math
import re
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import byte_tokenizer, command, finished, random_examples
from peft import PeftModel
from test_host import run
from test_sweep import ledger
from transformers import AutoModelForCausalLM

from inference.scores import Scores
from qlora.checkpoint_files import verify_checkpoint
from qlora.config import InputError
from qlora.data.row_shapes import Example, instruction_example
from reporting.verdicts import Measure, TrialReport, outlook, ranked, verdict
from tracking.champion import judge
from tuning import host as host_module
from tuning.checkpoints import Storage
from tuning.examples import PromptedExamples, SweepExamples
from tuning.host import Host, SweepData
from tuning.ledger import TrialRecord
from tuning.ledger import ranked as ranked_records
from tuning.objective import JudgingStoppedError, Objective, UnjudgedError
from tuning.progress import headline, ranking, table
from tuning.space import Space, load_space
from workflows.sweep.judging import make_judge

EXAMPLES = [
    instruction_example(n, f"ask {n}", output) for n, output in enumerate(("山水風", "春夏秋冬", "東"))
]
MINE = """import threading
import numpy as np
def short(examples, outputs):
    assert [example["output"] for example in examples] and len(examples) == len(outputs)
    return sum(map(len, outputs)) / len(outputs)

def broken(examples, outputs):
    raise KeyError("no such column")

def nothing(examples, outputs):
    return float("nan")

constant = 3

def answers_only(examples, outputs):
    assert outputs == [example["output"] for example in examples], "no answers"
    return 1.0

def careless(examples, outputs):
    examples.sort(key=lambda example: example["output"])
    examples[0]["output"] = ""
    return np.float32(0.5)

lock = threading.Lock()

def locked(examples, outputs):
    with lock:
        return 1.0

calls = []

def tired(examples, outputs):
    with open("calls.txt", "a") as file:
        file.write("called\\n")
    calls.append(1)
    if len(calls) > 2:
        raise ValueError("no more")
    return 1.0
"""


def test_an_objective_is_a_name_or_has_settings():
    base = {"data": {"train": "t", "public": "p"}, "search": {"lora_r": {"choice": [4]}}}
    plain = Space.model_validate(base).objective
    assert (plain.name, plain.more_is_better, plain.score(3.0), plain.words) == (
        "public_perplexity", False, 3.0, "public perplexity",
    )  # fmt: skip
    chrf = Space.model_validate({**base, "objective": "chrf"}).objective
    assert (chrf.score(40.0), chrf.label, chrf.max_new_tokens) == (-40.0, "chrf", 128)
    mine = Space.model_validate({**base, "objective": {"name": "my.own:loss", "mode": "min"}}).objective
    assert (mine.score(2.0), mine.label, mine.is_function) == (2.0, "loss", True)
    again = Space.model_validate_json(Space.model_validate({**base, "objective": "bleu"}).model_dump_json())
    assert again.objective.name == "bleu"


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("rouge", "'rouge' is no objective; there are public_perplexity, chrf, bleu, exact_match, and"),
        ("a module:function", "is no objective"),
        ("module:", "is no objective"),
        ({"name": "chrf", "mode": "min"}, "of chrf there can only be more"),
        ({"name": "public_perplexity", "mode": "max"}, "there can only be less"),
        ({"name": "chrf", "max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_what_is_no_objective_is_refused(objective, said):
    value = json.dumps(objective)
    with pytest.raises(InputError, match=said):
        load_space(
            "search_spaces/quickstart.yaml",
            [f"objective={json.dumps(value) if value is objective else value}"],
        )


@pytest.mark.parametrize("name", ["chrf", "bleu", "exact_match"])
def test_texts_are_scored_as_predictions_are(name):
    found = make_judge(Objective(name=name), "base", EXAMPLES, "public.json")
    texts = ["山水", "春夏秋冬", "西"]
    scores = Scores()
    for text, example in zip(texts, EXAMPLES, strict=True):
        scores.add(text, example.output)
    assert found.value(texts) == scores.summary()[name]
    assert make_judge(Objective(), "base", EXAMPLES, "public.json") is None


def test_a_function_of_ones_own_is_tried_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_tried.py").write_text(MINE)

    def made(name: str):
        return make_judge(Objective(name=name, mode="min"), "base", EXAMPLES, "public.json")

    assert made("mine_tried:short").value(["ab", "c", ""]) == 1.0
    for name, said in (
        ("not_there:f", "not_there can't be imported"),
        ("mine_tried:f", "mine_tried has no function f"),
        ("mine_tried:constant", "mine_tried has no function constant"),
        ("mine_tried:broken", "failed on the texts: .*no such column.*, which were the answers of public"),
        ("mine_tried:locked", "can't be sent to other processes: .*lock"),
        ("mine_tried:nothing", "gave nan, which is no finite number"),
    ):
        with pytest.raises(InputError, match=f"objective: .*{said}"):
            made(name)
    rows = [dict(row) for row in made("mine_tried:careless").rows]
    careless = made("mine_tried:careless")
    assert careless.value(["a", "b", "c"]) == careless.value(["a", "b", "c"]) == 0.5
    assert careless.rows == rows
    (tmp_path / "results/one").mkdir(parents=True)
    (tmp_path / "results/one/evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(InputError, match=r"results.one.evil lies among results, from which no code is run"):
        made("results.one.evil:f")
    (tmp_path / "work/results/project").mkdir(parents=True)  # a folder of people's own that is called so
    monkeypatch.chdir(tmp_path / "work/results/project")
    Path("mine_elsewhere.py").write_text(MINE)
    assert made("mine_elsewhere:short").value(["ab", "c", ""]) == 1.0
    with pytest.raises(InputError, match=r"public.json: is plain text"):
        make_judge(Objective(name="chrf"), "base", [Example(0, (), "text")], "public.json")


@pytest.fixture(scope="module")
def data(tiny_base) -> SweepData:
    space = Space.model_validate(
        {
            "base_model": {"name": str(tiny_base), "quantization": "none"},
            "data": {"train": "t", "public": "p"},
            "trial": {"batch_size": 4, "lora_dropout": 0.1, "lora_r": 4, "learning_rate": 0.03, "epochs": 6},
            "search": {"seed": {"choice": [1]}},
            "scheduler": {"type": "fifo"},
            "objective": {"name": "chrf", "max_new_tokens": 12},
        }
    )
    train, public = random_examples(12, vocabulary=250), random_examples(5, seed=3, vocabulary=250)
    answers = [byte_tokenizer().decode(one.answer[:-1]) for one in public]
    rows = [instruction_example(n, "ask", answer or "a") for n, answer in enumerate(answers)]
    found = make_judge(space.objective, str(tiny_base), rows, "public")
    prompted = PromptedExamples(train, public, asked=[one.prompt for one in public], ends=(2,))
    return SweepData(space, SweepExamples({"default": prompted}), 10_000, judge=found)


def test_a_host_judges_the_texts_of_its_trials(data, tiny_base, tmp_path):
    """They are those of plain transformers with the trial's adapter in PEFT."""
    threads = torch.get_num_threads()
    host = Host(data, 1)
    torch.set_num_threads(threads)

    def in_plain_peft(folder) -> float:
        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        if folder is not None:
            model = PeftModel.from_pretrained(model, str(folder))
        texts = []
        for prompt in data.examples.of({}).asked:
            out = model.eval().generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
            texts.append(byte_tokenizer().decode(out[0, len(prompt) :], skip_special_tokens=True).strip())
        return data.judge.value(texts)

    assert host.zero_shot_values() == {"default": in_plain_peft(None)}
    points = run(host, "t", {"seed": 1}, tmp_path)
    assert len(points) == 6
    for point in points:
        assert point["objective"] == in_plain_peft(tmp_path / f"t-{point['step']}" / "adapter")
        assert point["score"] == -point["objective"]
    assert len({point["objective"] for point in points}) > 1, "or nothing is shown"
    assert host.seconds()["writing texts"] > 0


def test_of_trials_that_are_judged_together_one_may_fail(data, tmp_path):
    """The others' values stand, and nothing is written again."""

    def picky(examples, outputs):
        if calls.append(outputs) or len(calls) == 2:
            raise ZeroDivisionError("in people's own function")
        return float(len(calls))

    calls = []
    judged = make_judge(Objective(name="chrf", max_new_tokens=12), "", EXAMPLES, "public")
    judged.base, judged.function = data.judge.base, picky
    threads = torch.get_num_threads()
    work = Host(SweepData(data.space, data.examples, 10_000, judge=judged), 1)._work
    torch.set_num_threads(threads)
    first, second, third = work.judge(judged, [(None, data.examples.of({}))] * 3, lambda: False)
    assert (first, third, len(calls)) == (1.0, 3.0, 3)
    assert isinstance(second, UnjudgedError)
    assert work.notes == []


def test_a_function_that_fails_on_a_trials_texts_ends_that_trial_alone(data, tmp_path):
    def picky(examples, outputs):
        if calls.append(outputs) or len(calls) == 2:
            raise ZeroDivisionError("in people's own function")
        return 1.0

    calls = []
    judged = make_judge(Objective(name="chrf", max_new_tokens=12), "", EXAMPLES, "public")
    judged.base, judged.function = data.judge.base, picky
    threads = torch.get_num_threads()
    host = Host(SweepData(data.space, data.examples, 10_000, judge=judged), 1)
    torch.set_num_threads(threads)
    for name in ("good", "bad", "other"):
        (tmp_path / name).mkdir()
        host.attach(name, name, {"seed": 1})
    assert host.advance("good", 1, str(tmp_path / "good"))["objective"] == 1.0
    with pytest.raises(UnjudgedError, match="chrf failed on the texts: in people's own function"):
        host.advance("bad", 1, str(tmp_path / "bad"))
    assert host.advance("other", 1, str(tmp_path / "other"))["objective"] == 1.0


def test_trials_that_are_due_wait_for_others_that_are_nearly_so(data, tmp_path, monkeypatch):
    """Their texts are written together; one that is far from its report keeps nobody waiting."""

    class Counting:
        def values(self, bank, requests, is_over):
            began.set()
            asked.append(len(requests))
            assert may_go_on.wait(60)
            return [1.0] * len(requests)

    monkeypatch.setitem(host_module._MOST_STEPS_TO_WAIT, "cpu", 24)  # as on a GPU
    began, may_go_on, asked = threading.Event(), threading.Event(), list[int]()
    threads = torch.get_num_threads()
    space = data.space.model_copy(update={"trial": {**data.space.trial, "epochs": 20}})
    host = Host(SweepData(space, data.examples, 10_000, judge=Counting()), 1)
    torch.set_num_threads(threads)
    goals = {"first": 1, "near": 14, "nearer": 2, "later": 30, "far": 58}
    for name in goals:
        (tmp_path / name).mkdir()
        host.attach(name, name, {"seed": 1})
    with ThreadPoolExecutor() as pool:
        answers = {"first": pool.submit(host.advance, "first", 1, str(tmp_path / "first"))}
        assert began.wait(60)
        for name in list(goals)[1:]:
            answers[name] = pool.submit(host.advance, name, goals[name], str(tmp_path / name))
        time.sleep(1)  # until all have asked, while texts are written
        may_go_on.set()
        assert {name: answer.result()["step"] for name, answer in answers.items()} == goals
    assert asked == [1, 2, 1, 1], "the first of those that wait does so for 24 steps at most"


def test_a_host_that_is_to_stop_writes_no_text_to_its_end(data, tmp_path):
    """The trial is kept where it stands, with the steps since its report."""

    class Slow:
        def values(self, bank, requests, is_over):
            began.set()
            while not is_over():
                time.sleep(0.01)
            raise JudgingStoppedError("in the middle")

    began = threading.Event()
    threads = torch.get_num_threads()
    host = Host(SweepData(data.space, data.examples, 10_000, judge=Slow()), 1)
    torch.set_num_threads(threads)
    (tmp_path / "t").mkdir()
    host.attach("t", "holder", {"seed": 1})
    asked = threading.Thread(target=host.advance, args=("t", 2, str(tmp_path / "t")), daemon=True)
    asked.start()
    assert began.wait(60)
    assert host.stop(Storage.at(str(tmp_path / "kept"))) == 1
    verify_checkpoint(tmp_path / "kept/t/checkpoint_stopped")


def point(step: int, perplexity: float, value: float, score: float) -> dict[str, float]:
    found = {"step": step, "epoch": 1.0, "schedule_percent": 50.0 * step, "public_perplexity": perplexity}
    return {**found, "objective": value, "score": score, "peak_memory_gib": 0.0, "training_loss": 1.0}


def test_records_are_ranked_by_their_scores():
    config = {"learning_rate": 1e-3, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "epochs": 1}
    low = TrialRecord("low", config, "finished", (point(1, 5.0, 30.0, -30.0), point(2, 4.0, 20.0, -20.0)))
    high = TrialRecord("high", config, "finished", (point(1, 9.0, 40.0, -40.0),))
    assert low.best["step"] == 1
    assert ranked_records([low, high]) == [high, low]
    chrf = Objective(name="chrf")
    words = table([low, high], 12.5, objective=chrf)
    assert "best chrf" in words
    assert words.splitlines()[1].split()[8:11] == ["40", "40", "+27.5"]
    assert "best 40 (high)" in headline([low, high], 2, 60.0, chrf)
    chats = TrialRecord("chats", {**config, "prompt": "chat"}, "finished", low.curve)
    bases = {"default": 12.5, "chat": 29.0}
    lines = table([chats, replace(high, config={**config, "prompt": "default"})], bases, objective=chrf)
    assert [line.split()[-2] for line in lines.splitlines()[1:]] == ["+27.5", "+1"]
    assert "zero-shot chrf 12.5 (default), 29 (chat)" in ranking([chats], bases, chrf)
    curve = (point(1, 9.0, 0.0, 0.0), point(2, 6.0, 0.0, 0.0), point(3, 7.0, 0.0, 0.0))
    even = TrialRecord("even", config, "finished", curve)  # as exact matches often are
    assert even.best["step"] == 2
    assert ranked_records([even, replace(even, curve=(point(1, 5.0, 0.0, 0.0),))])[1] is even
    old = {key: value for key, value in point(1, 5.0, 0.0, 0.0).items() if key not in ("score", "objective")}
    assert (
        TrialRecord("old", config, "finished", (old, {**old, "step": 2, "public_perplexity": 4.0})).best[
            "step"
        ]
        == 2
    )


def test_the_page_ranks_and_words_by_the_objective():
    def trial(name: str, values: list[float]) -> TrialReport:
        curve = [(50.0 * (n + 1), value) for n, value in enumerate(values)]
        return TrialReport(
            name, {"lora_r": 4}, "finished", "", curve, [5.0, 7.0], 1.0, 1.0, 0.0, 1.0, more_is_better=True
        )

    trials = [trial("a", [10.0, 30.0]), trial("b", [42.0, 20.0])]
    chrf = Measure("chrf", "chrf", more_is_better=True)
    assert [one.name for one in ranked(trials)] == ["b", "a"]
    assert verdict(trials, 12.0, None, chrf) == (
        "Trial b is best: chrf 42, zero-shot 12; its runner-up a has 30. Its public perplexity is 6."
    )
    assert outlook(trials, None, None, chrf) == ""


def test_versions_are_compared_by_the_objective_that_both_were_chosen_by():
    def version(number: int, **tags: str) -> SimpleNamespace:
        known = {"public_perplexity": "5.0", "zero_shot_public_perplexity": "9.0", "public_digest": "d"}
        return SimpleNamespace(version=number, tags={**known, **tags})

    def judged(number: int, value: str, base: str = "10.0", mode: str = "max", **tags: str):
        own = {"objective": "chrf", "objective_mode": mode, "objective_value": value}
        return version(number, **own, zero_shot_objective_value=base, **tags)

    assert judge(None, judged(1, "30.0")) == (True, "the first champion of this model")
    is_better, reason = judge(judged(1, "30.0"), judged(2, "31.0", tokenizer_digest="other", max_length="9"))
    assert (is_better, reason) == (True, "chrf 31 against 30 of version 1")
    assert not judge(judged(1, "30.0"), judged(2, "29.0"))[0]
    assert judge(judged(1, "3.0", mode="min"), judged(2, "2.0", mode="min"))[0]
    assert judge(None, judged(1, "9.0")) == (
        False,
        "chrf 9.0 is no better than the base alone, which has 10.0",
    )
    assert not judge(None, judged(1, "nan"))[0]
    of_lengths = [judged(n, f"{n}.5", "0.0", objective_max_new_tokens=f"{n}") for n in (1, 2)]
    is_better, reason = judge(*of_lengths)
    assert not is_better
    assert "by chrf of texts of 2 tokens, champion version 1 by chrf of texts of 1 tokens" in reason
    is_better, reason = judge(version(1), judged(2, "31.0"))
    assert not is_better
    assert "it was chosen by chrf, champion version 1 by public_perplexity" in reason
    assert "by public_perplexity, champion version 1 by chrf" in judge(judged(1, "31.0"), version(2))[1]
    # Worse perplexity than the base is no hindrance where texts are what counts.
    assert judge(None, judged(1, "30.0", public_perplexity="12.0"))[0]


@pytest.fixture(scope="module")
def sweep(project):
    content = yaml.safe_load((project / "space.yaml").read_text())
    content |= {"objective": {"name": "chrf", "max_new_tokens": 10}, "registered_model": "texts"}
    content |= {"num_samples": 1, "scheduler": {"type": "asha", "grace_period": 50, "reduction_factor": 2}}
    content["trial"] |= {"epochs": 6}
    content["search"] = {"learning_rate": {"grid_search": [1e-4, 0.01, 0.03]}}
    (project / "texts.yaml").write_text(yaml.safe_dump(content))
    out = finished(command(project, "tune", "--space", "texts.yaml", "--name", "texts"))
    return out, json.loads((project / "results/texts/summary.json").read_text())


@pytest.mark.ray
def test_a_sweep_goes_by_its_objective(project, sweep):
    """The best adapter's figure is the one that batch inference finds, with the registered version."""
    out, summary = sweep
    best = summary["best"]
    assert (summary["metric"], summary["mode"]) == ("chrf", "max")
    reached = {
        trial["trial_id"]: max(one["objective"] for one in trial["curve"]) for trial in summary["trials"]
    }
    assert best["objective"] == max(reached.values())
    assert reached[best["trial_id"]] == best["objective"]
    assert "; chrf " in out
    assert re.search(r"\ntime        about .* on one device, by what the base alone took, .* if nothing", out)
    assert f"chrf {best['objective']:.4g}, zero-shot {best['zero_shot_objective']:.4g}" in out
    finished(
        command(
            project, "batch_infer", "--model", best["model_uri"], "--input", "public.json", "--output",
            "texts.json", "--num-beams", "1", "--max-new-tokens", "10",
        )
    )  # fmt: skip
    scores = json.loads((project / "texts.json.meta.json").read_text())["scores"]
    assert scores["chrf"] == pytest.approx(best["objective"])
    with sqlite3.connect(project / "mlruns/mlflow.db") as store:
        found = store.execute("select key, value from model_version_tags where name = 'texts'").fetchall()
        logged = store.execute("select max(value) from metrics where key = 'best_objective'").fetchone()
    tags = dict(found)
    assert (tags["objective"], tags["objective_mode"]) == ("chrf", "max")
    assert float(tags["objective_value"]) == best["objective"] == logged[0]
    page = (project / "results/texts/report.html").read_text()
    assert f"Trial {best['trial_id']} is best: chrf" in page
    assert math.isfinite(best["public_perplexity"])


@pytest.mark.ray
def test_a_sweep_by_a_function_of_ones_own(project, sweep):
    """It runs in hosts, which have its file by value, and less may be better."""
    (project / "mine.py").write_text(MINE)
    out = finished(
        command(
            project, "tune", "--space", "texts.yaml", "--name", "mine", "--set",
            "objective={name: mine:short, mode: min, max_new_tokens: 10}", "--set", "registered_model=mine",
            "--set", "search.learning_rate={grid_search: [0.0001, 0.01]}",
        )
    )  # fmt: skip
    summary = json.loads((project / "results/mine/summary.json").read_text())
    values = [one["objective"] for trial in summary["trials"] for one in trial["curve"]]
    assert summary["best"]["objective"] == min(values)
    assert (summary["metric"], summary["mode"]) == ("mine:short", "min")
    assert "best short" in out
    assert "trials      " in out
    folder = project / "results/mine"
    (folder / "summary.json").rename(folder / "kept.json")
    (project / "mine.py").write_text(MINE.replace("sum(map(len", "2 * sum(map(len"))
    process = command(project, "tune", "--resume", "mine")
    again, _ = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "mine:short: changed since the sweep started" in again


@pytest.mark.ray
def test_a_function_that_fails_is_told_in_a_line_and_not_asked_again(project, sweep):
    """On the base's texts the sweep ends; on a trial's, the trial."""
    (project / "other.py").write_text(MINE)

    def refused(name: str) -> str:
        process = command(
            project, "tune", "--space", "texts.yaml", "--name", name, "--set",
            f"objective={{name: other:{name}, max_new_tokens: 10}}", "--set", "registered_model=other",
            "--set", "search.learning_rate={grid_search: [0.0001, 0.01]}",
        )  # fmt: skip
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 1
        assert "Traceback" not in out
        return out

    out = refused("answers_only")
    assert "other:answers_only failed on the texts: no answers" in out
    assert "which the base alone has written; a function is given whatever texts come" in out
    assert "other:tired failed on the texts: no more" in refused("tired")
    records = ledger(project, "tired").values()
    assert [record["status"] for record in records] == ["failed"] * 2
    assert len((project / "calls.txt").read_text().splitlines()) == 4  # the answers, the base, two trials
