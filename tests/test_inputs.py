"""Every kind of bad input ends a command with exit code 2 and one `error:` line, before a model loads or Ray
starts.
"""

import json
import os
import shutil
import sys
from unittest.mock import patch

import pytest
import yaml
from conftest import tiny_model
from safetensors.torch import save_file

import ray_jobs.batch_infer
import ray_jobs.evaluate
import ray_jobs.promote
import ray_jobs.tune
import workflows.sweep.start
from qlora.base import model as base_model
from qlora.config import BaseModelSettings, first_line
from qlora.files import read_yaml
from qlora.home import PROJECT_ROOT
from tuning.space import load_space
from workflows import session

GOOD = [
    {"id": "a", "instruction": "翻譯：甲", "output": "乙"},
    {"id": "b", "instruction": "翻譯：丙", "output": "丁"},
]
GOOD_TURN = {"role": "user", "content": "x"}
BAD_DATA = {
    "columns that say nothing": ({"id": "a"}, "row 0: is of no known shape; its columns are id;"),
    "no rows": ([], "holds no rows"),
    "a row that is text": (["x"], "row 0: must be an object"),
    "true as id": ([{"id": True, "instruction": "x", "output": "y"}], "row 0: id must be text or a number"),
    "a number that is none as id": (
        [{"id": float("nan"), "instruction": "x", "output": "y"}],
        "row 0: id must be text or a number, no finite number",
    ),
    "an empty id": ([{"id": " ", "instruction": "x", "output": "y"}], "row 0: id is empty"),
    "the same id twice": ([GOOD[0], GOOD[0]], "row 1: id 'a' was used in row 0"),
    "the same id as number and as text": (
        [{"id": 1, "instruction": "x", "output": "y"}, {"id": "1", "instruction": "z", "output": "y"}],
        "row 1: id '1' was used in row 0",
    ),
    "a row of another shape": (
        [GOOD[0], {"id": "c", "prompt": "x", "completion": "y"}],
        "row 1: has no 'instruction'",
    ),
    "a number as Alpaca's input": (
        [{"instruction": "x", "input": 3, "output": "y"}],
        "row 0: input must be text, not a number",
    ),
    "messages that are text": ([{"messages": "hello"}], "must be a list of messages, not text"),
    "no messages": ([{"messages": []}], "must be a list of messages, not an empty list"),
    "a message of nobody": ([{"messages": [{"role": "tool", "content": "x"}]}], "is of the role 'tool'"),
    "a message that is a list": ([{"messages": [["user", "x"]]}], "message 0 must be an object"),
    "a picture": (
        [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}],
        "message 0 holds more than text",
    ),
    "an answer to nothing": ([{"conversations": [{"from": "gpt", "value": "x"}]}], "no message of the user"),
    "a system message in the middle": (
        [{"messages": [{"role": role, "content": "x"} for role in ("user", "system", "assistant")]}],
        "has a system message that is not the first",
    ),
    "an empty instruction": ([{"id": "a", "instruction": " ", "output": "y"}], "row 0: instruction is empty"),
    "null as instruction": (
        [{"id": "a", "instruction": None, "output": "y"}],
        "row 0: instruction must be text, not null",
    ),
    "half a surrogate pair": ([{"id": "a", "instruction": "\ud800", "output": "y"}], "surrogate"),
}
BAD_ANSWERS = {
    "a question without an answer": ([{"messages": [GOOD_TURN]}], "has no message of the assistant"),
    "no output": ([{"id": "a", "instruction": "x"}], "row 0: has no 'output'"),
    "an empty output": ([{"id": "a", "instruction": "x", "output": ""}], "row 0: output is empty"),
    "a list as output": (
        [{"id": "a", "instruction": "x", "output": ["y"]}],
        "row 0: output must be text, not a list",
    ),
}
BAD_FILES = {
    "missing": (None, "no such file"),
    "cut off": (b'[{"id": "a", ', "line 1: is not valid JSON"),
    "not UTF-8": ("[{}]".encode("utf-16"), "is not UTF-8"),
    "empty": (b"", "is not valid JSON"),
}


@pytest.fixture(autouse=True)
def nothing_heavy_happens(monkeypatch):
    """Loading weights or starting Ray during validation fails the test."""

    def forbidden(*_, **__):
        raise AssertionError("this must not happen before the input is checked")

    load = base_model.AutoModelForCausalLM.from_pretrained

    def load_headers(*names, **options):
        return load(*names, **options) if options.get("device_map") == "meta" else forbidden()

    monkeypatch.setattr(base_model.AutoModelForCausalLM, "from_pretrained", load_headers)
    monkeypatch.setattr(session, "connect_ray", forbidden)
    monkeypatch.setattr(workflows.sweep.start, "connect_ray", forbidden)
    monkeypatch.setattr(ray_jobs.batch_infer, "connect_ray", forbidden)


def refused(module, capsys, monkeypatch, *arguments) -> str:
    """Run a command that must refuse its input; returns the one error line."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [f"{module.__name__.rpartition('.')[2]}.py", *map(str, arguments)])
    # a command makes its process's environment its own
    with patch.dict(os.environ), pytest.raises(SystemExit) as end:
        session.run(module.main)
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2, error
    assert error.startswith("error: ")
    assert "\n" not in error
    return error


def good_space(base, write_rows) -> dict:
    """The content of a space file that nothing is wrong with."""
    data = str(write_rows(GOOD, "good.json"))
    return {
        "base_model": {"name": str(base)},
        "data": {"train": data, "public": data},
        "search": {"learning_rate": {"loguniform": [1e-4, 1e-2]}},
        "num_samples": 2,
    }


@pytest.fixture
def evaluate(capsys, monkeypatch, tiny_base, tmp_path):
    def run(data, *more):
        options = ("--base-model", tiny_base, "--data", data, "--output", tmp_path / "o.json")
        error = refused(ray_jobs.evaluate, capsys, monkeypatch, *options, *more)
        assert not list(tmp_path.glob("*o.json*")), "nothing is written"
        return error

    return run


@pytest.fixture
def infer(capsys, monkeypatch, tiny_base, tmp_path):
    def run(data, *more, base=True):
        options = ("--base-model", tiny_base) if base else ()
        options += ("--input", data, "--output", tmp_path / "o.json")
        error = refused(ray_jobs.batch_infer, capsys, monkeypatch, *options, *more)
        assert not list(tmp_path.glob("*o.json*")), "nothing is written"
        return error

    return run


@pytest.fixture
def tune(capsys, monkeypatch, tiny_base, write_rows, tmp_path):
    """Run tune.py on a good space changed by `change`, a function of the YAML mapping."""

    def run(change=lambda space: None, *more):
        space = good_space(tiny_base, write_rows)
        change(space)
        path = tmp_path / "space.yaml"
        path.write_text(yaml.safe_dump(space), encoding="utf-8")
        options = ("--space", path, "--name", "never-started", *more)
        error = refused(ray_jobs.tune, capsys, monkeypatch, *options)
        assert not (PROJECT_ROOT / "results/never-started").exists(), "nothing is written"
        return error

    return run


@pytest.mark.parametrize("case", {**BAD_DATA, **BAD_ANSWERS})
def test_evaluate_refuses_bad_rows(case, evaluate, write_rows):
    rows, problem = {**BAD_DATA, **BAD_ANSWERS}[case]
    assert problem in evaluate(write_rows(rows))


@pytest.mark.parametrize("case", BAD_DATA)
def test_batch_infer_refuses_bad_rows(case, infer, write_rows):
    rows, problem = BAD_DATA[case]
    assert problem in infer(write_rows(rows), "--prompt", "default")


@pytest.mark.parametrize("case", {**BAD_DATA, **BAD_ANSWERS})
def test_tune_refuses_bad_rows(case, tune, write_rows):
    rows, problem = {**BAD_DATA, **BAD_ANSWERS}[case]
    bad = write_rows(rows, "bad.json")
    error = tune(lambda space: space["data"].update(public=str(bad)))
    assert problem in error
    assert str(bad) in error


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(case, evaluate, infer, tmp_path):
    content, problem = BAD_FILES[case]
    path = tmp_path / "data.json"
    if content is not None:
        path.write_bytes(content)
    for run in (evaluate, infer):
        assert problem in run(path)


SPACES = {
    "an unknown key": (lambda s: s.update(serach={}), "serach: unknown key; did you mean search?"),
    "a key that means nothing": (lambda s: s.update(zzz=1), "zzz: unknown key; remove it or mend"),
    "another tool's length": (
        lambda s: s.update(cutoff_len=512),
        "cutoff_len: unknown key; here that is max_length",
    ),
    "another tool's epochs": (
        lambda s: s.update(num_train_epochs=3),
        "num_train_epochs: unknown key; here that is trial.epochs",
    ),
    "another tool's optimizer": (
        lambda s: s.update(trial={"optim": "adamw_8bit"}),
        "unknown key; here that is AdamW, and no setting",
    ),
    "another tool's batches": (
        lambda s: s.update(trial={"gradient_accumulation_steps": 8}),
        "here that is trial.batch_size, the examples of a step",
    ),
    "another tool's warmup": (
        lambda s: s["search"].update(warmup_ratio={"choice": [0.1]}),
        "search.warmup_ratio is no trial setting; here that is trial.warmup_fraction",
    ),
    "an unknown setting": (
        lambda s: s["search"].update(learning_rat={"choice": [1]}),
        "search.learning_rat is no trial setting; did you mean learning_rate?",
    ),
    "an unknown sampler": (
        lambda s: s["search"].update(lora_r={"choose": [1]}),
        "search.lora_r.choose is no sampler",
    ),
    "a sampler without a list": (lambda s: s["search"].update(lora_r={"choice": 4}), "takes a list"),
    "two samplers": (
        lambda s: s["search"].update(lora_r={"choice": [4], "randint": [1, 2]}),
        "must hold one sampler",
    ),
    "bounds the wrong way round": (
        lambda s: s["search"].update(learning_rate={"uniform": [0.1, 0.01]}),
        "must be below upper",
    ),
    "a log scale from zero": (
        lambda s: s["search"].update(learning_rate={"loguniform": [0, 0.01]}),
        "lower must be above 0",
    ),
    "text as a bound": (
        lambda s: s["search"].update(learning_rate={"uniform": ["a", "b"]}),
        "takes the numbers [lower, upper]",
    ),
    "a bound too many": (
        lambda s: s["search"].update(learning_rate={"uniform": [0.1, 0.2, 0.3]}),
        "takes the numbers",
    ),
    "a fraction as rank": (lambda s: s["search"].update(lora_r={"choice": [1.5]}), "search.lora_r"),
    "half ranks": (lambda s: s["search"].update(lora_r={"randint": [1, 2.5]}), "whole numbers"),
    "certain dropout": (
        lambda s: s["search"].update(lora_dropout={"uniform": [0.0, 1.0]}),
        "search.lora_dropout",
    ),
    "no epochs": (lambda s: s["search"].update(epochs={"choice": [0]}), "positive integer or stages"),
    "epochs without end": (lambda s: s.update(trial={"epochs": 10**9}), "10000 are the most"),
    "stages without end": (lambda s: s["search"].update(epochs={"choice": ["9999+2"]}), "10000 are the most"),
    "no layers": (lambda s: s.update(trial={"target_modules": []}), "names no layer"),
    "a layer without a name": (
        lambda s: s["search"].update(target_modules={"choice": [["q_proj", ""]]}),
        "names no layer",
    ),
    "odd stages": (lambda s: s["search"].update(epochs={"choice": ["1+x"]}), "positive integer or stages"),
    "nothing to search": (lambda s: s.update(search={}), "search is empty"),
    "fixed and searched": (lambda s: s.update(trial={"learning_rate": 0.1}), "under both trial and search"),
    "an unknown fixed setting": (lambda s: s.update(trial={"bach_size": 4}), "trial.bach_size"),
    "an infinite rate": (
        lambda s: s["search"].update(learning_rate={"choice": [float("inf")]}),
        "search.learning_rate",
    ),
    "grace above max_t": (
        lambda s: s.update(scheduler={"type": "asha", "max_t": 50, "grace_period": 60}),
        "grace_period 60 must be below",
    ),
    "more than 100 percent": (
        lambda s: s.update(scheduler={"type": "asha", "max_t": 200}),
        "can't be above 100",
    ),
    "no reduction": (
        lambda s: s.update(scheduler={"type": "asha", "reduction_factor": 1}),
        "reduction_factor",
    ),
    "an unknown scheduler": (lambda s: s.update(scheduler={"type": "pbt"}), "scheduler"),
    "fractions as ranks": (
        lambda s: s["search"].update(lora_r={"uniform": [4, 64]}),
        "search.lora_r.uniform draws fractions",
    ),
    "log fractions as ranks": (
        lambda s: s["search"].update(lora_r={"loguniform": [4, 64]}),
        "search.lora_r.loguniform draws fractions",
    ),
    "a rounded rank of zero": (
        lambda s: s["search"].update(lora_r={"quniform": [0, 8, 1]}),
        "search.lora_r: 0",
    ),
    "a rounded half rank": (
        lambda s: s["search"].update(lora_r={"quniform": [1, 8, 0.5]}),
        "search.lora_r.quniform draws fractions",
    ),
    "a dropout rounded to one": (
        lambda s: s["search"].update(lora_dropout={"quniform": [0, 1, 0.1]}),
        "search.lora_dropout: 1",
    ),
    "no bounds": (lambda s: s["search"].update(lora_dropout={"randn": [0.1, 0.1]}), "randn has no bounds"),
    "no bounds, rounded": (
        lambda s: s["search"].update(lora_r={"qrandn": [8, 2, 1]}),
        "qrandn has no bounds",
    ),
    "fractions of epochs": (
        lambda s: s["search"].update(epochs={"uniform": [1, 3]}),
        "search.epochs.uniform draws fractions",
    ),
    "a seed that is too large": (lambda s: s.update(seed=2**32), "seed"),
    "a trial's seed that is too large": (lambda s: s.update(trial={"seed": 2**32}), "trial.seed"),
    "half a trial a GPU": (lambda s: s.update(trials_per_gpu=0), "auto or a whole number"),
    "a model name that MLflow refuses": (lambda s: s.update(registered_model=".."), "can't be a name"),
    "a model name with a quote": (lambda s: s.update(registered_model="o'clock"), "can't be a name"),
    "no samples": (lambda s: s.update(num_samples=0), "num_samples"),
    "no data": (lambda s: s.pop("data"), "data"),
    "an unknown prompt": (lambda s: s.update(prompt="nosuch"), "no prompt named 'nosuch'"),
    "a prompt that needs shots": (lambda s: s.update(prompt="few-shot"), "needs shots"),
    "an unknown base": (lambda s: s.update(base_model={"name": "nosuch"}), "nosuch: is no base model"),
    "an unknown quantization": (
        lambda s: s.update(base_model={"name": "x", "quantization": "int3"}),
        "base_model.quantization",
    ),
    "a grid for optuna": (
        lambda s: s.update(searcher={"type": "optuna"}, search={"lora_r": {"grid_search": [4]}}),
        "grid_search",
    ),
    "keys in the storage": (
        lambda s: s.update(storage="s3://KEY:CANARY@bucket/x"),
        ":storage: holds a name, a password or a key",
    ),
    "a key in the storage's options": (
        lambda s: s.update(storage="s3://bucket/x?secret_key=CANARY&access_key=CANARY"),
        ":storage: holds a name, a password or a key",
    ),
    "a storage that can't be": (lambda s: s.update(storage="/proc/none"), "can't be written to"),
    "a storage of no scheme": (lambda s: s.update(storage="nosuch://bucket/x"), "can't be written to"),
    "a model name with a slash": (lambda s: s.update(registered_model="a/b"), "registered_model"),
}


@pytest.mark.parametrize("case", SPACES)
def test_tune_refuses_bad_spaces(case, tune):
    change, problem = SPACES[case]
    error = tune(change)
    assert problem in error
    assert "CANARY" not in error


def test_a_key_that_stands_twice_is_refused(tune, capsys, monkeypatch, tmp_path):
    """The last one would win without a word."""
    path = tmp_path / "twice.yaml"
    path.write_text(
        "data: {train: a, public: b}\nsearch:\n  lora_r: {choice: [4]}\n  lora_r: {choice: [8]}\n"
    )
    error = refused(ray_jobs.tune, capsys, monkeypatch, "--space", path, "--name", "x")
    assert f"{path}:line 4: is not valid YAML: the key 'lora_r' stands twice" in error


def test_a_space_of_merged_keys_and_bare_parts_is_read(tmp_path):
    """Keys of one's own stand above those that are merged; a part whose keys are all comments is none."""
    path = tmp_path / "merged.yaml"
    path.write_text(
        "data: {train: a, public: b}\n"
        "trial: &few\n  <<: {batch_size: 2, lora_r: 8}\n  lora_r: 4\n"
        "scheduler:\n  # type: fifo\nbase_model:\nsearch:\n  learning_rate: {choice: [0.1]}\n"
    )
    space = load_space(path, ["scheduler.type=fifo"])
    assert space.trial == {"batch_size": 2, "lora_r": 4}
    assert space.scheduler.type == "fifo" and space.base_model == BaseModelSettings()
    path.write_text("b: &b {r: 8}\nl: [&x {<<: *b, r: 4}, {<<: *x}, {<<: [*x, *b]}]\n")
    assert read_yaml(path, "")["l"] == [{"r": 4}, {"r": 4}, {"r": 4}]


def test_a_space_file_whose_name_can_be_no_models_is_refused(tune, capsys, monkeypatch, tmp_path, write_rows):
    data = str(write_rows(GOOD))
    path = tmp_path / "a:b.yaml"
    space = {"data": {"train": data, "public": data}, "search": {"lora_r": {"choice": [4]}}}
    path.write_text(yaml.safe_dump(space), encoding="utf-8")
    error = refused(ray_jobs.tune, capsys, monkeypatch, "--space", path, "--name", "x")
    assert "set registered_model" in error


def test_a_number_of_too_many_digits_is_refused(evaluate, infer, tmp_path):
    for text in ('[{"id": "a", "n": %s}]', '{"id": "a", "n": %s}'):
        path = tmp_path / ("digits.json" if text[0] == "[" else "digits.jsonl")
        path.write_text(text % ("9" * 5000), encoding="utf-8")
        for run in (evaluate, infer):
            assert "line 1: holds a number of too many digits" in run(path)


def test_the_output_of_evaluate_has_to_be_a_file(evaluate, write_rows, tmp_path):
    assert "is a folder" in evaluate(write_rows(GOOD), "--output", tmp_path)


def test_an_output_that_could_not_be_written_in_the_end_is_refused(evaluate, infer, write_rows, tmp_path):
    for run in (evaluate, infer):
        assert "has too long a name" in run(write_rows(GOOD), "--output", tmp_path / ("x" * 240))


def test_tune_refuses_bad_options(tune, capsys, monkeypatch, tmp_path):
    assert "must read dotted.key=value" in tune(lambda s: None, "--set", "num_samples")
    assert "num_samples" in tune(lambda s: None, "--set", "num_samples=none")
    assert "--set" in tune(lambda s: None, "--set", "num_samples.x=1")
    assert "unrecognized" in tune(lambda s: None, "--samples", "3")

    def alone(*arguments):
        return refused(ray_jobs.tune, capsys, monkeypatch, *arguments)

    assert "--space FILE" in alone()
    assert "no such file" in alone("--space", tmp_path / "nosuch.yaml", "--name", "x")
    assert "there is no sweep 'nosuch'" in alone("--resume", "nosuch")
    assert "--resume: '../x' can't be a name" in alone("--resume", "../x")
    assert "--resume: studies is the folder of studies" in alone("--resume", "studies")
    assert "give it alone" in alone("--resume", "x", "--dry-run")
    (tmp_path / "bad.yaml").write_text("a: [1", encoding="utf-8")
    assert "is not valid YAML" in alone("--space", tmp_path / "bad.yaml", "--name", "x")
    (tmp_path / "list.yaml").write_text("- 1", encoding="utf-8")
    assert "must be a YAML mapping" in alone("--space", tmp_path / "list.yaml", "--name", "x")


def test_tune_continues_from_fitting_adapters_only(tune, tmp_path):
    def with_adapter(**config):
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", **config}), encoding="utf-8"
        )
        save_file({}, tmp_path / "adapter_model.safetensors")
        return tune(lambda s: None, "--continue-from", str(tmp_path))

    whole = {"base_model_name_or_path": "another", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    assert "belongs to the base another" in with_adapter(**whole)
    assert "names no base_model" in with_adapter(r=4)
    assert "use_rslora, which trials don't have" in with_adapter(**whole, use_rslora=True)
    assert "says no lora_alpha" in with_adapter(
        base_model_name_or_path="another", r=4, target_modules=["q_proj"]
    )
    assert "has no adapter_config.json" in tune(lambda s: None, "--continue-from", str(tmp_path / "nosuch"))
    assert "give it alone" in tune(lambda s: None, "--continue-from", str(tmp_path), "--resume", "x")


def test_the_reason_of_an_error_is_no_heading():
    assert first_line(ValueError("\nCan't be made of one of:\n\n  (1) a file\n(2) two")) == (
        "Can't be made of one of: (1) a file"
    )
    assert first_line(ValueError("One line.\nAnother")) == "One line."
    assert first_line(ValueError("Only this:")) == "Only this:"
    assert first_line(KeyError("a")) == "KeyError('a')" and first_line(ValueError()) == "ValueError()"


def test_promote_refuses_what_it_does_not_know(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")

    def asked(*arguments):
        return refused(ray_jobs.promote, capsys, monkeypatch, *arguments)

    assert "is no registered model" in asked("nobody")
    assert "is no registered model" in asked("nobody", "--version", "1")
    assert "is no registered model" in asked("nobody", "--roll-back")
    assert "not allowed with" in asked("nobody", "--roll-back", "--version", "1")
    assert "at least 1" in asked("nobody", "--version", "0")


def test_bad_bases_and_adapters_are_refused(capsys, monkeypatch, write_rows, tmp_path, tiny_base):
    data = write_rows(GOOD)

    def with_base(*options):
        return refused(
            ray_jobs.evaluate, capsys, monkeypatch, "--data", data, "--output", tmp_path / "o.json", *options
        )

    (tmp_path / "empty").mkdir()
    assert "has no config.json" in with_base("--base-model", tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert "holds no tokenizer" in with_base("--base-model", tmp_path / "empty")
    shutil.copytree(tiny_base, tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "holds no *.safetensors" in with_base("--base-model", tmp_path / "light")
    (tmp_path / "empty" / "config.json").write_text("{", encoding="utf-8")
    assert "is not valid JSON" in with_base("--base-model", tmp_path / "empty")
    assert "is no base model" in with_base("--base-model", "a/b/c")
    assert "can't be loaded" in with_base("--base-model", "nobody/nothing@0123")
    assert "is missing" in with_base()
    at_folder = tmp_path / "model@home"
    shutil.copytree(tiny_base, at_folder)
    assert "is missing" not in with_base("--base-model", at_folder, "--prompt", "nosuch"), (
        "an @ in a path is one"
    )
    assert "has no adapter_config.json" in with_base("--adapter", tmp_path / "empty")
    assert "must read models:/NAME@ALIAS" in with_base("--adapter", "models:/x")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "IA3"}', encoding="utf-8")
    assert "not LORA" in with_base("--adapter", adapter)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    assert "holds no adapter_model.safetensors" in with_base("--adapter", adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"cut off")
    assert "is damaged" in with_base("--adapter", adapter)
    save_file({}, adapter / "adapter_model.safetensors")
    assert "names no base_model" in with_base("--adapter", adapter)


def test_remote_code_is_refused(capsys, monkeypatch, write_rows, tmp_path):
    folder = tmp_path / "remote"
    tiny_model("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    config |= {
        "model_type": "nosuch",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "evil.py").write_text("raise SystemExit('ran remote code')", encoding="utf-8")
    error = refused(
        ray_jobs.evaluate,
        capsys,
        monkeypatch,
        "--base-model",
        folder,
        "--data",
        write_rows(GOOD),
        "--output",
        tmp_path / "o",
    )
    assert "can't be loaded" in error


def test_shots_and_prompts_are_checked(evaluate, write_rows, tmp_path):
    data = write_rows(GOOD)
    shots = write_rows(GOOD, "shots.json")
    assert "belong together" in evaluate(data, "--shots", "2")
    assert "takes no shots" in evaluate(data, "--prompt", "default", "--shots", "1", "--shots-from", shots)
    assert "holds 2 examples, fewer" in evaluate(data, "--shots", "3", "--shots-from", shots)
    assert "no such file" in evaluate(data, "--shots", "1", "--shots-from", tmp_path / "nosuch.json")
    assert "--shots" in evaluate(data, "--shots", "-1", "--shots-from", shots)
    template = tmp_path / "t.yaml"
    template.write_text("template: no placeholder", encoding="utf-8")
    assert "must hold {instruction} once" in evaluate(data, "--prompt", template)
    template.write_text("template: '{instruction} {shots}'", encoding="utf-8")
    assert "belong together" in evaluate(data, "--prompt", template)


def test_a_prompt_without_room_for_an_answer_is_refused(evaluate, write_rows):
    long = write_rows([GOOD[0], {"id": "b", "instruction": "甲" * 2000, "output": "乙"}])
    assert "row 1: the prompt has" in evaluate(long)


def test_batch_infer_refuses_bad_options(infer, write_rows, tmp_path):
    data = write_rows(GOOD)
    assert "give --model URI" in infer(data, base=False)
    assert "both name an adapter" in infer(data, "--model", "models:/x@champion", "--adapter", tmp_path)
    assert "num_beams" in infer(data, "--num-beams", "0")
    assert "max_new_tokens" in infer(data, "--max-new-tokens", "0")
    assert "no room" in infer(data, "--max-new-tokens", "4096")
    assert "is more than" in infer(data, "--max-new-tokens", "4", "--min-new-tokens", "5")
    assert "--early-stopping" in infer(data, "--early-stopping", "maybe")
    assert "needs do_sample" in infer(data, "--top-p", "0.9")
    assert "top_p" in infer(data, "--do-sample", "--top-p", "1.5")
    assert "--num-beams" in infer(data, "--num-beams", "three")
    assert "--workers" in infer(data, "--workers", "0")
    assert "is a folder" in infer(data, "--output", tmp_path)
