"""A sweep whose trials end near each other registers their average, if that is better than each of them."""

import gc
import json
import random
import shutil
import sqlite3
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from conftest import WORDS, command, finished, random_examples
from oracles import loop_perplexities
from test_host import run, threads  # noqa: F401
from transformers import AutoModelForCausalLM

import tuning.shared_work
from qlora.checkpoint_files import ADAPTER, CheckpointError
from qlora.files import write_json
from qlora.lora.average import rank_of, read_update
from qlora.lora.peft_folder import load_adapter
from qlora.perplexity import mean_perplexity
from reporting.verdicts import outlook
from tuning.best_adapter import keep_best_adapter
from tuning.checkpoints import Storage
from tuning.examples import PromptedExamples, SweepExamples
from tuning.host import Host, SweepData
from tuning.ledger import Ledger, TrialRecord
from tuning.soup import Finalist, affordable_averages, finalists, keep_soup, kept_soup
from tuning.space import Space
from workflows.sweep.best import averages_are_due
from workflows.sweep.folder import reopen_sweep
from workflows.sweep.holdout import holdout_is_due, measure_holdout
from workflows.sweep.prepared import prepare, read_inputs


@pytest.fixture(scope="module")
def data(tiny_base) -> SweepData:
    """Examples of few tokens, whose frequencies can be learned; training on them too often overfits."""
    space = Space.model_validate(
        {
            "base_model": {"name": str(tiny_base), "quantization": "none"},
            "data": {"train": "t", "public": "p"},
            "trial": {"batch_size": 4, "lora_dropout": 0.0, "epochs": 4},
            "search": {"learning_rate": {"choice": [0.01]}},
            "scheduler": {"type": "fifo"},
        }
    )
    train, public = random_examples(24, vocabulary=20), random_examples(12, seed=3, vocabulary=20)
    return SweepData(space, SweepExamples({"default": PromptedExamples(train, public)}), 10_000)


@pytest.fixture
def trained(data, tmp_path):
    """A host and three finalists whose checkpoints are kept, the best first: two alike, one far behind."""
    host, found = Host(data, 1), []
    configs = [{"lora_r": 4, "seed": 1}, {"lora_r": 8, "seed": 2}, {"learning_rate": 1e-6, "lora_r": 2}]
    for number, config in enumerate(configs):
        points = run(host, f"t{number}", {"learning_rate": 0.01, **config}, tmp_path)
        folder = tmp_path / "ray" / f"t{number}" / "checkpoint_000001"
        shutil.copytree(tmp_path / f"t{number}-{points[-1]['step']}", folder)
        last = points[-1]
        found.append(Finalist(f"t{number}", last["step"], last["public_perplexity"], str(folder), "default"))
    return host, sorted(found, key=lambda one: one.public_perplexity), Storage.at(str(tmp_path / "ray"))


def in_peft(base: str, folder: Path, examples) -> float:
    """Perplexity by transformers, PEFT and a loop."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return mean_perplexity(loop_perplexities(load_adapter(model, folder).eval(), examples))


def by_merging(base: str, folders: list[Path], examples) -> float:
    """Perplexity of the base with the mean of the adapters' products added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for folder in folders:
            for layer, (a, b) in read_update(folder).items():
                model.get_submodule(layer).weight += b @ a / len(folders)
    return mean_perplexity(loop_perplexities(model.eval(), examples))


def test_members_are_added_while_the_average_gets_better(data, trained, tmp_path):
    """It is what a loop over merged weights finds, and the folder is what was measured."""
    host, found, storage = trained
    base, adapters = data.space.base_model.name, [Path(one.checkpoint) / ADAPTER for one in found]
    chosen, lowest = [0], found[0].public_perplexity
    for i in (1, 2):
        together = [adapters[j] for j in (*chosen, i)]
        value = by_merging(base, together, data.examples.of({}).public)
        if value < lowest:
            chosen, lowest = [*chosen, i], value
    soup, files = host.soup(storage, found, 10)
    assert len(chosen) > 1, "or nothing is shown"
    assert list(soup.weights) == [found[i].trial_id for i in chosen]
    assert sum(soup.weights.values()) == pytest.approx(1)
    assert soup.public_perplexity == pytest.approx(lowest, rel=1e-4)
    assert soup.public_perplexity == pytest.approx(mean_perplexity(soup.perplexities))
    files.write(tmp_path / "soup")
    assert in_peft(base, tmp_path / "soup", data.examples.of({}).public) == pytest.approx(lowest, rel=1e-4)
    assert soup.lost == 0, "its rank is the sum of its members'"


def test_an_average_that_is_no_better_leaves_the_best_trial(trained):
    host, found, storage = trained
    far = [one for one in found if one.trial_id in ("t2", found[0].trial_id)]
    soup, files = host.soup(storage, far, 10)
    assert (soup.weights, soup.public_perplexity, files) == ({}, None, None)
    assert soup.measured == 1
    assert not soup.beats(1e9)


def test_no_more_is_measured_than_there_is_time_for(trained):
    host, found, storage = trained
    assert host.soup(storage, found, 1)[0].measured == 1


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7])
def test_what_a_lower_rank_costs_is_measured_within_the_limit(trained, monkeypatch, most):
    host, found, storage = trained
    monkeypatch.setattr("tuning.soup.MAX_GPU_RANK", 1)
    monkeypatch.setattr("tuning.soup._MOST_LOST", 1.0)
    assert host.soup(storage, found, most)[0].measured <= most


def test_a_member_that_does_not_help_is_let_go(trained, monkeypatch):
    """Holds, of a dozen finalists with gigabytes each, the chosen ones and the one that is tried."""
    host, found, storage = trained
    held, counts = weakref.WeakSet(), []

    class Held(dict):
        __hash__ = object.__hash__

    def reads(folder):
        update = Held(read_update(folder))
        held.add(update)
        gc.collect()
        counts.append(len(held))
        return update

    monkeypatch.setattr("tuning.soup.read_update", reads)
    best, second, far = found
    assert len(host.soup(storage, [best, far, second], 10)[0].weights) == 2
    assert counts == [1, 2, 2]


def test_an_average_that_finds_no_memory_is_left_out(trained, monkeypatch):
    """The others are measured all the same."""
    host, found, storage = trained
    attach, tried = tuning.shared_work.attach_update, []

    def short_of_memory(bank, update):
        tried.append(rank_of(update))
        if len(tried) == 1:
            raise torch.cuda.OutOfMemoryError("no room")
        return attach(bank, update)

    monkeypatch.setattr(tuning.shared_work, "attach_update", short_of_memory)
    soup, _ = host.soup(storage, found, 10)
    assert soup.measured == len(tried) - 1 == len(found) - 2
    assert f"an average of rank {tried[0]} finds no memory: it is left out" in host.notes()


def test_an_average_that_finds_no_memory_at_a_lower_rank_leaves_the_one_that_fits(trained, monkeypatch):
    host, found, storage = trained

    def short_of_memory(*_):
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr("tuning.soup.MAX_GPU_RANK", 1)  # then the largest member's rank, 8, is what fits
    monkeypatch.setattr("tuning.soup.reduced", short_of_memory)
    soup, files = host.soup(storage, found, 10)
    assert (soup.weights, files) == ({}, None), "here that is the best trial"
    assert any("finds no memory: it is left out" in note for note in host.notes())


def test_an_average_of_too_high_a_rank_is_brought_to_one_that_fits(data, trained, monkeypatch):
    """Its loss is measured against the exact average; where it is too high, fewer members are taken."""
    host, found, storage = trained
    exact, _ = host.soup(storage, found, 10)
    monkeypatch.setattr("tuning.soup.MAX_GPU_RANK", 1)  # then the largest member's rank, 8, is what fits
    monkeypatch.setattr("tuning.soup._MOST_LOST", 1.0)
    soup, files = host.soup(storage, found, 10)
    assert soup.rank == 8 < exact.rank
    assert soup.lost == pytest.approx(soup.public_perplexity / exact.public_perplexity - 1)
    assert json.loads(files.contents["adapter_config.json"])["r"] == 8
    monkeypatch.setattr("tuning.soup._MOST_LOST", -1.0)
    assert host.soup(storage, found, 10)[0].weights == {}


def test_a_damaged_checkpoint_is_no_member(trained):
    host, found, storage = trained
    weights = Path(found[1].checkpoint) / ADAPTER / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    soup, _ = host.soup(storage, found, 10)
    assert found[1].trial_id not in soup.weights
    assert f"trial {found[1].trial_id}: its best checkpoint is damaged; it is in no average" in host.notes()
    first = Path(found[0].checkpoint) / ADAPTER / "adapter_model.safetensors"
    first.write_bytes(b"")
    with pytest.raises(CheckpointError):  # its trial goes on from the checkpoint before
        host.soup(storage, found, 10)


def record(name: str, perplexity: float, status: str = "finished", epochs: float = 1.0) -> TrialRecord:
    point = {"step": 24.0, "epoch": epochs, "public_perplexity": perplexity}
    return TrialRecord(name, {}, status, curve=(point,))


def test_finalists_are_the_best_that_ended_by_themselves(trained):
    """Trials that are far behind, failed or have no checkpoint are none."""
    storage = trained[2]
    records = [
        record("t0", 5.0),
        record("t1", 5.1, "stopped"),
        record("t2", 9.0),
        record("gone", 5.2),
        record("t3", 4.0, "failed"),
    ]
    assert [
        one.trial_id
        for one in finalists(records, SweepExamples({"default": PromptedExamples([], [])}), storage)
    ] == ["t0", "t1"]


def test_both_checkpoints_of_a_trial_are_finalists(trained):
    """The newest need not be the best, and what is far off is none."""
    host, found, storage = trained
    best = found[0]
    for number, step in ((2, 30), (3, 36)):
        folder = Path(best.checkpoint).with_name(f"checkpoint_{number:06d}")
        shutil.copytree(best.checkpoint, folder)
        position = json.loads((folder / "position.json").read_text())
        (folder / "position.json").write_text(json.dumps({**position, "step": step}))
    curve = [(best.step, 5.0), (30, 5.1), (36, 9.0)]
    points = tuple({"step": step, "epoch": 1.0, "public_perplexity": value} for step, value in curve)
    records = [TrialRecord(best.trial_id, {}, "finished", points)]
    listed = finalists(records, SweepExamples({"default": PromptedExamples([], [])}), storage)
    assert [(one.step, one.public_perplexity) for one in listed] == [(best.step, 5.0), (30, 5.1)]
    (Path(listed[1].checkpoint) / ADAPTER / "adapter_model.safetensors").write_bytes(b"")
    host.soup(storage, listed, 10)
    said = f"trial {best.trial_id}: its checkpoint of step 30 is damaged; it is in no average"
    assert said in host.notes()


def test_averages_are_a_small_share_of_the_sweep():
    """It counts forward passes: training a token is three of them."""
    train, public = random_examples(30, seed=1), random_examples(10, seed=2)
    tokens, asked = (sum(one.num_tokens for one in each) for each in (train, public))
    records = [record(str(number), 5.0, epochs=10) for number in range(5)]
    examples = SweepExamples({"default": PromptedExamples(train, public)})
    found = affordable_averages(records, examples)
    assert found == int(0.04 * (3 * 50 * tokens + 5 * asked) / asked)
    assert found > 0
    assert affordable_averages([record("short", 5.0, epochs=0.1)], examples) == 0


def test_what_averaging_came_to_is_kept_for_these_finalists(trained, tmp_path):
    host, found, storage = trained
    soup, files = host.soup(storage, found, 10)
    keep_soup(tmp_path, soup, files)
    assert kept_soup(tmp_path, found) == soup
    assert kept_soup(tmp_path, found[:2]) is None
    weights = tmp_path / "soup" / ADAPTER / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert kept_soup(tmp_path, found) is None
    keep_soup(tmp_path, soup, files)
    (tmp_path / "soup/soup.json").write_text("{")
    assert kept_soup(tmp_path, found) is None


@pytest.fixture(scope="module")
def sweep(project):
    """A sweep of trials that differ in their seeds, on drawn answers: there is only so much to learn."""
    generator = random.Random(2)
    rows = [
        {
            "id": f"e{n}",
            "instruction": "".join(generator.choices(WORDS, k=2)),
            "output": generator.choice("山水風雲"),
        }
        for n in range(32)
    ]
    (project / "drawn.json").write_text(json.dumps(rows[:16]), encoding="utf-8")
    (project / "asked.json").write_text(json.dumps(rows[16:]), encoding="utf-8")
    (project / "held.json").write_text(json.dumps(rows[12:20]), encoding="utf-8")
    space = yaml.safe_load((project / "space.yaml").read_text())
    data = {"train": "drawn.json", "public": "asked.json", "holdout": "held.json"}
    space |= {"data": data, "registered_model": "mean"}
    space |= {"search": {"seed": {"grid_search": [1, 2, 3, 4]}}, "num_samples": 1}
    space["scheduler"] = {"type": "fifo"}
    space["trial"] |= {"learning_rate": 0.01, "epochs": 10}
    del space["soup"]  # it is on by itself
    (project / "seeds.yaml").write_text(yaml.safe_dump(space))
    out = finished(command(project, "tune", "--space", "seeds.yaml", "--name", "seeds"))
    return out, json.loads((project / "results/seeds/summary.json").read_text())


@pytest.mark.ray
def test_an_average_that_wins_is_registered_as_what_it_is(project, tiny_base, sweep):
    out, summary = sweep
    best = summary["best"]
    ids = {trial["trial_id"] for trial in summary["trials"]}
    assert best["trial_id"] is None
    assert set(best["trial_ids"]) <= ids
    assert len(best["trial_ids"]) == len(best["weights"]) > 1
    assert sum(best["weights"]) == pytest.approx(1)
    alone = min(point["public_perplexity"] for trial in summary["trials"] for point in trial["curve"])
    assert best["public_perplexity"] < alone
    names = ", ".join(best["trial_ids"])
    assert f"averages    of {names}: public perplexity {best['public_perplexity']:.4f}" in out
    assert f"best        average of trials {names}: public perplexity" in out
    assert best["mlflow_run_id"] == summary["mlflow_run_id"]
    page = (project / "results/seeds/report.html").read_text()
    assert (
        f"The average of trials {', '.join(best['trial_ids'][:-1])} and {best['trial_ids'][-1]} is best"
        in page
    )
    card = (project / best["checkpoint"] / "README.md").read_text()
    assert f"LoRA adapter of the average of trials {names}" in card
    folders = [checkpoint(project, one["trial_id"], one["step"]) for one in best["members"]]
    assert len(folders) > len(best["trial_ids"]), "both of a trial's checkpoints may be members"
    shares = dict.fromkeys(best["trial_ids"], 0.0)
    for one in best["members"]:
        assert one["weight"] == pytest.approx(1 / len(folders))
        shares[one["trial_id"]] += one["weight"]
    assert list(shares.values()) == pytest.approx(best["weights"])
    examples = encoded(project, tiny_base, "asked.json")
    expected = by_merging(str(tiny_base), folders, examples)
    assert best["public_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert in_peft(str(tiny_base), project / best["checkpoint"], examples) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.ray
def test_a_holdout_is_measured_for_the_best_adapter_and_its_runner_up(project, tiny_base, sweep):
    """It is nobody's choice: the figures stand in the summary, in the report and in the version's tags."""
    out, summary = sweep
    held, examples = summary["holdout"], encoded(project, tiny_base, "held.json")
    adapter = project / summary["best"]["checkpoint"]
    assert held["count"] == 8
    assert held["perplexity"] == pytest.approx(in_peft(str(tiny_base), adapter, examples), rel=1e-4)
    assert held["interval"][0] < held["perplexity"] < held["interval"][1]
    alone = {
        trial["trial_id"]: min(point["public_perplexity"] for point in trial["curve"])
        for trial in summary["trials"]
    }
    second = held["runner_up"]
    assert second["trial_id"] == min(alone, key=alone.get)
    (path,) = (project / "results/seeds/trials").glob(f"*-{second['trial_id']}.json")
    step = min(json.loads(path.read_text())["curve"], key=lambda point: point["public_perplexity"])["step"]
    found = in_peft(str(tiny_base), checkpoint(project, second["trial_id"], step), examples)
    assert second["perplexity"] == pytest.approx(found, rel=1e-4)
    assert held["difference"]["mean"] == pytest.approx(held["perplexity"] - second["perplexity"])
    overlap = "8 examples, instruction + output; 8 of them ask what a training or public example asks"
    assert f"holdout     {overlap}, of held.json" in out
    assert f"On the holdout ({overlap}), on which nothing was chosen" in (
        project / "results/seeds/report.html"
    ).read_text(encoding="utf-8")
    with sqlite3.connect(project / "mlruns/mlflow.db") as store:
        tags = dict(store.execute("select key, value from model_version_tags where name = 'mean'").fetchall())
        contexts = store.execute("select value from input_tags where name = 'mlflow.data.context'").fetchall()
    assert float(tags["holdout_perplexity"]) == held["perplexity"]
    assert tags["holdout_interval"] == "{:.5g} to {:.5g}".format(*held["interval"])
    assert {value for (value,) in contexts} == {"train", "public", "holdout"}


@pytest.mark.ray
def test_a_holdout_is_measured_once(project, sweep, monkeypatch):
    """A sweep that goes on takes what was measured, also if the runner-up's checkpoint was damaged."""
    monkeypatch.setenv("QLORA_HOME", str(project))
    monkeypatch.chdir(project)
    folder = reopen_sweep(project / "results/seeds")
    prepared = prepare(folder, read_inputs(folder))
    assert not averages_are_due(folder, prepared)
    assert not holdout_is_due(folder, prepared)
    found = finalists(
        list(Ledger(folder.folder / "trials").records.values()),
        prepared.examples,
        Storage.at(f"{folder.folder}/ray"),
    )
    best = keep_best_adapter(folder.folder, folder.storage, kept_soup(folder.folder, found))
    nobody = None  # who would be asked
    assert measure_holdout(folder, prepared, nobody, best).summary() == sweep[1]["holdout"]
    content = json.loads((folder.folder / "holdout.json").read_text())
    write_json(folder.folder / "holdout.json", {**content, "perplexities": []})
    kept = measure_holdout(folder, prepared, nobody, best)
    assert "runner_up" not in kept.summary()
    assert "trial" not in outlook([], None, kept.report("8 examples"))
    write_json(folder.folder / "holdout.json", {**content, "digests": ["other", "examples"]})
    with pytest.raises(AttributeError):  # another adapter's: somebody is asked
        measure_holdout(folder, prepared, nobody, best)
    write_json(folder.folder / "holdout.json", content)


def checkpoint(project: Path, trial: str, step: int) -> Path:
    for folder in (project / "results/seeds/ray" / trial).glob("checkpoint_*"):
        if json.loads((folder / "position.json").read_text())["step"] == step:
            return folder / ADAPTER
    raise AssertionError(f"no checkpoint of step {step}")


def encoded(project: Path, tiny_base: Path, name: str, prompt: str = ""):
    from transformers import AutoTokenizer

    from qlora.data.examples import load_examples
    from qlora.data.prompts import encode_examples, load_prompt

    rows = load_examples(project / name, need_output=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    return encode_examples(tokenizer, load_prompt(prompt or str(project / "plain.yaml")), rows, "public")


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_goes_on_from_an_average(project, sweep):
    """It takes its rank, alpha and layers over, and the first perplexities are near the average's."""
    best = sweep[1]["best"]
    options = (
        "--continue-from",
        best["model_uri"],
        "--set",
        "trial.learning_rate=1e-6",
        "--set",
        "trial.epochs=1",
    )
    out = finished(command(project, "tune", "--space", "seeds.yaml", "--name", "on", *options))
    found = json.loads((project / "results/on/summary.json").read_text())
    assert "rank 8" not in out, "averages of its own are of a higher rank"
    for trial in found["trials"]:
        assert trial["curve"][0]["public_perplexity"] == pytest.approx(best["public_perplexity"], rel=1e-3)


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_without_averages_or_cut_before_them_comes_to_the_same(project, sweep):
    """`soup: off` leaves them out; what a sweep that goes on lacks is measured then."""
    out = finished(command(project, "tune", "--space", "seeds.yaml", "--name", "off", "--set", "soup=off"))
    alone = json.loads((project / "results/off/summary.json").read_text())["best"]
    assert "averages" not in out
    assert alone["trial_ids"] == [alone["trial_id"]]
    before = project / "results/seeds"
    kept = json.loads((before / "summary.json").read_text())["best"]
    shutil.copytree(before, project / "kept")
    shutil.rmtree(before / "soup")
    (before / "summary.json").unlink()
    out = finished(command(project, "tune", "--resume", "seeds"))
    assert "averages    of " in out
    assert json.loads((before / "summary.json").read_text())["best"] == kept
