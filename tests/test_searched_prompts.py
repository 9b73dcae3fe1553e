"""Prompts and numbers of training examples that are searched: each trial has its own tokens on one base."""

import json
import sqlite3
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import command, finished, random_examples
from test_host import run
from test_soup import encoded, in_peft

from qlora.checkpoint_files import MANIFEST
from qlora.config import InputError
from qlora.data.prompts import EncodedExample
from qlora.lora.bank import load_bank
from qlora.perplexity import adapter_perplexities, mean_perplexity
from qlora.training import Training, advance_together
from tuning.checkpoints import Storage
from tuning.examples import PromptedExamples, SweepExamples
from tuning.host import Host, SweepData
from tuning.ledger import TrialRecord
from tuning.soup import finalists
from tuning.space import Space, load_space


def space(**changes) -> Space:
    content = {
        "data": {"train": "t", "public": "p"},
        "search": {"prompt": {"choice": ["default", "chat"]}, "train_examples": {"randint": [4, 9]}},
    }
    return Space.model_validate({**content, **changes})


def under(prompt: str, count: int = 12) -> PromptedExamples:
    """Examples whose answers are the same under each prompt."""
    lead = tuple(range(40, 40 + 3 * len(prompt)))

    def led(examples: list[EncodedExample]) -> list[EncodedExample]:
        return [replace(one, prompt=(*lead, *one.prompt)) for one in examples]

    train, public = random_examples(count, vocabulary=250), random_examples(5, seed=3, vocabulary=250)
    return PromptedExamples(led(train), led(public))


def test_prompts_and_numbers_of_examples_are_searched_like_settings():
    found = space()
    assert found.prompts == ["default", "chat"]
    assert found.values("train_examples") == [4, 8]
    config = {"learning_rate": 1e-3, "prompt": "chat", "train_examples": 5}
    assert found.trial_settings(config).learning_rate == 1e-3
    full = found.trial_config(config)
    assert (full["prompt"], full["train_examples"], full["lora_r"]) == ("chat", 5, 64)
    assert "prompt" not in found.trial_config({"learning_rate": 1e-3})
    drawn = space(search={"train_examples": {"quniform": [4, 8, 4]}}).trial_config({"train_examples": 8.0})
    assert (drawn["train_examples"], type(drawn["train_examples"])) == (8, int)
    assert space(prompt="few", search={"lora_r": {"choice": [4]}}).prompts == ["few"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "default"}, "prompt stands under search, and as prompt"),
        (
            {"data": {"train": "t", "public": "p", "train_examples": 4}},
            "and as data.train_examples; keep one",
        ),
        ({"trial": {"prompt": "chat"}}, "prompt is no setting of training"),
        ({"trial": {"train_examples": 4}}, "it is data.train_examples"),
        ({"search": {"prompt": {"choice": ["chat", None]}}}, "give values, not null"),
        ({"search": {"prompt": {"uniform": [0, 1]}}}, "search.prompt"),
        ({"search": {"train_examples": {"choice": [0, 4]}}}, "search.train_examples"),
        ({"search": {"train_examples": {"uniform": [1, 4]}}}, "draws fractions"),
    ],
)
def test_what_can_be_no_prompt_or_number_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        space(**changes)


def test_a_trial_has_the_examples_of_its_configuration():
    found = SweepExamples({"default": under("default"), "chat": under("chat")})
    assert found.of({}) == found.of({"prompt": "default"}) == found.by_prompt["default"]
    few = found.of({"prompt": "chat", "train_examples": 5})
    assert (few.train, few.public) == (found.by_prompt["chat"].train[:5], found.by_prompt["chat"].public)
    assert found.of({"train_examples": 5.0}).train == found.by_prompt["default"].train[:5]
    assert found.longest() == found.by_prompt["default"]
    found.check_compare()


def test_prompts_whose_perplexities_do_not_compare_are_refused():
    one, other = under("default"), under("chat")
    ended = [replace(example, answer=(*example.answer[:-1], 7)) for example in other.public]
    SweepExamples({"a": one, "b": replace(other, public=ended)}).check_compare()  # another end of turn
    cut = [replace(other.public[0], answer=other.public[0].answer[:-1], is_cut=True), *other.public[1:]]
    with pytest.raises(InputError, match=r"b scores other tokens than a in 1 of 5 .* raise max_length"):
        SweepExamples({"a": one, "b": replace(other, public=cut)}).check_compare()
    whole = [replace(example, answer=(9, *example.answer)) for example in other.public]
    with pytest.raises(InputError, match="in 5 of 5 examples"):
        SweepExamples({"a": one, "b": replace(other, public=whole)}).check_compare()


def test_trials_of_unlike_prompts_share_passes_and_equal_trials_alone(tiny_base, tmp_path):
    settings = {
        "base_model": {"name": str(tiny_base), "quantization": "none"},
        "trial": {"batch_size": 4, "lora_r": 4, "lora_dropout": 0.1, "learning_rate": 0.01, "epochs": 2},
        "scheduler": {"type": "fifo"},
    }
    chosen, examples = space(**settings), SweepExamples({"default": under("default"), "chat": under("chat")})
    threads = torch.get_num_threads()
    host = Host(SweepData(chosen, examples, 10_000), 1)
    torch.set_num_threads(threads)
    configs = [{"prompt": "default", "train_examples": 12}, {"prompt": "chat", "train_examples": 5}]
    for number, config in enumerate(configs):
        (tmp_path / str(number)).mkdir()
        found = run(host, f"t{number}", config, tmp_path / str(number))
        own, bank = examples.of(config), load_bank(chosen.base_model)
        training = Training(bank, own.train, chosen.trial_settings(config))
        while not training.finished:
            advance_together([training], 10_000)
        expected = mean_perplexity(adapter_perplexities(bank, [(training.adapter, own.public)], 10_000)[0])
        assert found[-1]["public_perplexity"] == pytest.approx(expected, rel=1e-5)
        assert found[-1]["step"] == training.step
        zero_shot = adapter_perplexities(bank, [(None, own.public)], 10_000)[0]
        assert host.zero_shot()[config["prompt"]] == pytest.approx(zero_shot, rel=1e-5)


def test_only_trials_of_one_prompt_are_averaged(tmp_path):
    def record(name: str, perplexity: float, prompt: str) -> TrialRecord:
        point = {"step": 2, "epoch": 1.0, "schedule_percent": 100.0, "public_perplexity": perplexity}
        folder = tmp_path / name / "checkpoint_00000002"
        folder.mkdir(parents=True)
        (folder / "position.json").write_text('{"step": 2}')
        (folder / MANIFEST).write_text("{}")
        return TrialRecord(name, {"prompt": prompt}, "finished", ({**point, "peak_memory_gib": 0.0},))

    records = [record("a", 5.0, "chat"), record("b", 5.1, "default"), record("c", 5.2, "chat")]
    examples = SweepExamples({"default": under("default"), "chat": under("chat")})
    found = finalists(records, examples, Storage.at(str(tmp_path)))
    assert [(one.trial_id, one.prompt) for one in found] == [("a", "chat"), ("c", "chat")]


@pytest.fixture(scope="module")
def sweep(project):
    """A sweep over three prompts and two numbers of examples, with a holdout."""
    (project / "other.yaml").write_text('template: "Q:{instruction}A:"', encoding="utf-8")
    content = yaml.safe_load((project / "space.yaml").read_text())
    del content["prompt"]
    rows = json.loads((project / "public.json").read_text())
    (project / "held.json").write_text(json.dumps(rows[4:]), encoding="utf-8")
    content["data"]["holdout"] = "held.json"
    content |= {"num_samples": 1, "scheduler": {"type": "fifo"}, "registered_model": "prompts"}
    content["trial"] |= {"learning_rate": 0.01, "epochs": 3}
    content["search"] = {
        "prompt": {"grid_search": ["plain.yaml", "other.yaml", "default"]},
        "train_examples": {"grid_search": [4, 16]},
    }
    del content["soup"]
    (project / "prompts-space.yaml").write_text(yaml.safe_dump(content))
    out = finished(command(project, "tune", "--space", "prompts-space.yaml", "--name", "searched"))
    return out, json.loads((project / "results/searched/summary.json").read_text())


@pytest.mark.ray
def test_the_registered_version_carries_its_trials_prompt(project, tiny_base, sweep):
    out, summary = sweep
    configs = [trial["config"] for trial in summary["trials"]]
    assert {(one["prompt"], one["train_examples"]) for one in configs} == {
        (prompt, count) for prompt in ("plain.yaml", "other.yaml", "default") for count in (4, 16)
    }
    by_steps = {one["config"]["train_examples"]: one["curve"][-1]["step"] for one in summary["trials"]}
    assert by_steps == {4: 3, 16: 12}
    best = next(one for one in summary["trials"] if one["trial_id"] in summary["best"]["trial_ids"])
    prompt = best["config"]["prompt"]
    known = json.loads((project / "results/searched/zero_shot.json").read_text())["by_prompt"]
    assert set(known) == {"plain.yaml", "other.yaml", "default"}
    assert summary["zero_shot"] == known[prompt]
    assert all(f"{value:.4f} ({name})" in out for name, value in known.items())
    source = project / "prompts/default.yaml" if prompt == "default" else project / prompt
    assert (project / "results/searched/prompt.yaml").read_text() == source.read_text()
    with sqlite3.connect(project / "mlruns/mlflow.db") as store:
        tags = dict(
            store.execute("select key, value from model_version_tags where name = 'prompts'").fetchall()
        )
    assert tags["prompt"] == prompt
    shown = encoded(project, tiny_base, "public.json", prompt if prompt == "default" else str(source))
    adapter = project / summary["best"]["checkpoint"]
    assert in_peft(str(tiny_base), adapter, shown) == pytest.approx(
        summary["best"]["public_perplexity"], rel=1e-4
    )
    out = finished(
        command(
            project, "evaluate", "--adapter", summary["best"]["model_uri"], "--data", "public.json",
            "--output", "evaluated.json",
        )
    )  # fmt: skip
    assert f"{summary['best']['public_perplexity']:.4f}" in out
    assert summary["holdout"]["count"] == 4
    page = (project / "results/searched/report.html").read_text()
    assert "train_examples" in page
    assert "other.yaml" in page


def test_more_examples_than_there_are_are_refused(project):
    process = command(
        project, "tune", "--space", "space.yaml", "--dry-run", "--set",
        "search.train_examples={choice: [8, 17]}",
    )  # fmt: skip
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "search.train_examples: asks for 17 examples, but train.json holds 16" in out


@pytest.mark.ray
def test_a_searched_prompt_that_changed_is_told(project, sweep):
    folder = project / "results/searched"
    (folder / "summary.json").rename(folder / "kept.json")
    (project / "other.yaml").write_text('template: "Q:{instruction} A:"', encoding="utf-8")
    process = command(project, "tune", "--resume", "searched")
    out, _ = process.communicate(timeout=200)
    (folder / "kept.json").rename(folder / "summary.json")
    assert process.returncode == 2
    assert "other.yaml" in out
    assert "changed since the sweep started" in out


def test_the_space_of_what_people_search_by_hand_is_sound():
    found = load_space("search_spaces/by-hand.yaml", [])
    assert {"prompt", "batch_size", "warmup_fraction", "lora_r", "lora_alpha", "epochs"} <= set(found.search)
    assert "chat" in found.prompts
