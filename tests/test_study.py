"""The report's study on a tiny base with a real local Ray: one lineage, nothing trained twice, nothing done
twice.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import command, finished
from oracles import loop_perplexities
from peft import PeftModel
from test_inputs import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

import ray_jobs.study
from qlora.config import BaseModelSettings, TrialSettings
from qlora.data.examples import load_examples
from qlora.data.prompts import encode_examples, load_prompt
from qlora.lora.bank import load_bank
from qlora.training import Training
from workflows.study.settings import Study

TRIAL = {"learning_rate": 0.01, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "batch_size": 4}


@pytest.fixture(scope="module")
def study(project, tiny_base):
    settings = {
        "base_model": {"name": str(tiny_base), "quantization": "none"},
        "data": {"train": "train.json", "public": "public.json"},
        "trial": TRIAL,
        "stages": ["1+2", "1+1"],
        "shots": 2,
        "beams": [1, 2],
        "sampling": {"top_k": 5},
        "max_new_tokens": 4,
        "num_predictions": 3,
        "reported": {"base": "another base", "stages": {"1": 5.06}, "prompts": {"adapter": 4.95}},
    }
    (project / "study.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    out = finished(command(project, "study", "--study", "study.yaml", "--name", "small"))
    return project / "results/studies/small", out


def step(study, key: str) -> dict:
    return json.loads((study[0] / "steps" / f"{key}.json").read_text(encoding="utf-8"))


def encoded(project, tiny_base, name: str):
    examples = load_examples(project / f"{name}.json", need_output=True)
    return encode_examples(AutoTokenizer.from_pretrained(tiny_base), load_prompt(), examples, name)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("stages", ["1", "1+2", "1+1"])
def test_a_point_of_a_lineage_is_what_one_run_of_its_stages_gives(study, project, tiny_base, stages):
    """Trained in one go, and measured by PEFT and a loop."""
    training = Training(
        load_bank(BaseModelSettings(name=str(tiny_base), quantization="none")),
        encoded(project, tiny_base, "train"),
        TrialSettings.model_validate({**TRIAL, "epochs": stages, "seed": 0}),
    )
    while not training.finished:
        training.advance(10_000)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), study[0] / "adapters" / stages
    )
    training.bank.save(training.adapter, study[0] / "whole" / stages)
    whole = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), study[0] / "whole" / stages
    )
    public = encoded(project, tiny_base, "public")
    found = step(study, f"perplexity-{stages}")["values"]
    assert found == pytest.approx(loop_perplexities(model.eval(), public), rel=1e-4)
    assert found == pytest.approx(loop_perplexities(whole.eval(), public), rel=1e-3)


@pytest.mark.ray
@pytest.mark.slow
def test_the_page_has_the_reports_tables(study, project):
    page = (study[0] / "study.html").read_text(encoding="utf-8")
    for heading in ("Stages", "Learning curves", "Prompts", "Beams and sampling", "Predictions side by side"):
        assert f"<h2>{heading}</h2>" in page
    for stages in ("1", "1+2", "1+1"):
        assert f"<td>{step(study, f'perplexity-{stages}')['mean']:.4g}</td>" in page
    assert "<td>5.06</td>" in page and "<td>4.95</td>" in page
    assert page.count("reported (another base)") == 2
    rows = json.loads((project / "public.json").read_text(encoding="utf-8"))
    assert sum(f"<td><div>{row['instruction']}</div></td>" in page for row in rows) == 3
    assert "<script" not in page
    assert step(study, "text-few-shot")["count"] == len(rows)


@pytest.mark.ray
@pytest.mark.slow
def test_a_second_run_does_nothing_twice_and_never_mixes(study, project):
    files = {path: path.stat().st_mtime_ns for path in (study[0] / "steps").iterdir()}
    (study[0] / "steps" / "text-sampling.json").unlink()
    out = finished(command(project, "study", "--study", "study.yaml", "--name", "small"))
    assert [line.split("  ")[0] for line in out.splitlines() if " s  " in line] == ["text sampling"]
    after = {path: path.stat().st_mtime_ns for path in (study[0] / "steps").iterdir()}
    assert {path for path in files if files[path] != after[path]} == {
        study[0] / "steps" / "text-sampling.json"
    }
    process = command(project, "study", "--study", "study.yaml", "--name", "small", "--set", "shots=1")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "holds a study with other settings or data" in out


def test_what_lineages_share_comes_once_and_parents_first():
    study = Study.model_validate({"data": {"train": "t", "public": "p"}, "stages": ["1+1+3", "1+1+1"]})
    assert study.nodes() == [(1,), (1, 1), (1, 1, 3), (1, 1, 1)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"trial": {"epochs": 2}}, "epochs come from stages"),
        ({"trial": {"lora_r": 0}}, "lora_r"),
        ({"stages": []}, "at least one lineage"),
        ({"stages": ["9999+2"]}, "10000 are the most"),
        ({"stages": ["1+x"]}, "epochs must be"),
        ({"beams": [0]}, "each at least 1"),
        ({"shots": 0}, "shots"),
        ({"colour": 1}, "colour"),
        ({"data": {"train": "nosuch.json", "public": "nosuch.json"}}, "no such file"),
        ({"num_predictions": 99}, "fewer than num_predictions"),
    ],
)
def test_bad_studies_are_refused(change, problem, tiny_base, write_rows, tmp_path, capsys, monkeypatch):
    rows = str(write_rows([{"id": str(n), "instruction": "甲", "output": "乙"} for n in range(4)]))
    settings = {
        "base_model": {"name": str(tiny_base)},
        "data": {"train": rows, "public": rows},
        "num_predictions": 2,
        "shots": 2,
        **change,
    }
    path = Path(tmp_path / "study.yaml")
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    monkeypatch.setenv("QLORA_HOME", str(tmp_path))
    assert problem in refused(ray_jobs.study, capsys, monkeypatch, "--study", path, "--name", "never")
