"""An adapter that does not fit its base, or is of no numbers, is told on one line before a model loads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_model
from safetensors.torch import load_file, save_file
from test_inputs import GOOD, evaluate, nothing_heavy_happens, tune  # noqa: F401

from qlora.config import TrialSettings
from qlora.lora.bank import AdapterBank
from workflows.model_choice import ModelOptions, choose_model

ODD_ADAPTERS = {
    "of another rank": (lambda m: {**m, A: torch.zeros(2, 64)}, "matrices differ, such as"),
    "without a layer": (lambda m: {name: m[name] for name in m if name not in (A, B)}, "is not there"),
    "with a layer more": (
        lambda m: {**m, A.replace("layers.0", "layers.7"): m[A].clone()},
        "should be not there",
    ),
    "that holds NaN": (lambda m: {**m, B: torch.full_like(m[B], torch.nan)}, "holds NaN or infinity"),
    "that holds infinity": (lambda m: {**m, B: torch.full_like(m[B], torch.inf)}, "holds NaN or infinity"),
}
A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{matrix}.weight" for matrix in "AB")


@pytest.fixture
def adapter(tiny_base, tmp_path):
    """The folder of an adapter that fits the base."""
    bank = AdapterBank(tiny_model("llama").requires_grad_(False), str(tiny_base))
    folder = tmp_path / "adapter"
    bank.save(bank.attach(TrialSettings(lora_r=4, target_modules=("q_proj",))), folder)
    return folder


@pytest.mark.parametrize("case", ODD_ADAPTERS)
def test_an_adapter_that_trials_would_stumble_over_later(case, adapter, tune):  # noqa: F811
    change, words = ODD_ADAPTERS[case]
    path = adapter / "adapter_model.safetensors"
    matrices = load_file(path)
    path.unlink()
    save_file(change(matrices), path)
    found = tune(lambda s: None, "--continue-from", str(adapter), "--dry-run")
    assert words in found and "adapter" in found


@pytest.mark.parametrize("value", ["4", None, True, [4]])
@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_a_rank_and_an_alpha_are_numbers(key, value, adapter, evaluate, write_rows):  # noqa: F811
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert f"{key} must be a number" in evaluate(write_rows(GOOD), "--adapter", adapter)


@pytest.mark.parametrize(("key", "value"), [("r", 0), ("r", -1), ("lora_alpha", float("nan"))])
def test_a_rank_and_an_alpha_are_numbers_of_use(key, value, adapter, evaluate, write_rows):  # noqa: F811
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert "r must be at least 1, and" in evaluate(write_rows(GOOD), "--adapter", adapter)


def test_an_adapter_of_no_numbers_is_named_not_its_base(adapter, evaluate, write_rows):  # noqa: F811
    path = adapter / "adapter_model.safetensors"
    matrices = {name: torch.full_like(matrix, torch.nan) for name, matrix in load_file(path).items()}
    path.unlink()
    save_file(matrices, path)
    error = evaluate(write_rows(GOOD), "--adapter", adapter)
    assert error.startswith(f"error: {adapter}: ") and "holds NaN or infinity" in error


def test_a_base_that_an_adapter_does_not_name_is_told(adapter, tiny_base, tmp_path):
    def told(base: Path | str) -> tuple[str, ...]:
        return choose_model(ModelOptions(adapter=str(adapter), base_model=str(base))).overridden

    assert told(tiny_base) == () == told(tiny_base / ".." / tiny_base.name)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    (tmp_path / "other").symlink_to(tiny_base)
    assert told(tmp_path / "other") == ()
    shutil.copytree(tiny_base, tmp_path / "copy")
    assert told(tmp_path / "copy") == (
        f"base model {tmp_path / 'copy'}, in place of {tiny_base}, which {adapter} names",
    )
    path.write_text(json.dumps({**config, "base_model_name_or_path": "us/base", "revision": "abc"}))
    assert told("us/base") == (), "the same, of which no commit is named"


def test_what_is_otherwise_than_in_the_sweep_of_an_adapter_is_told(adapter, tiny_base, tmp_path):
    """Its folder names its base alone, so that another quantisation or prompt would go unseen."""
    sweep = tmp_path / "results" / "mine"
    shutil.copytree(adapter, sweep / "best")
    shutil.copy(ROOT / "prompts/instruction.yaml", sweep / "prompt.yaml")
    space = {"base_model": {"name": str(tiny_base), "quantization": "none"}}
    (sweep / "sweep.json").write_text(json.dumps({"space": space}))

    def told(folder: Path, **options: str) -> tuple[str, ...]:
        return choose_model(ModelOptions(adapter=str(folder), **options)).overridden

    assert told(sweep / "best") == (
        "quantization nf4, in place of none, which the sweep mine has",
        f"prompt default, in place of the prompt of the sweep mine ({sweep / 'prompt.yaml'})",
    )
    own = {"quantization": "none", "prompt": str(sweep / "prompt.yaml")}
    assert told(sweep / "best", **own) == ()
    assert told(adapter) == (), "of no sweep"
    (sweep / "sweep.json").write_text("{")
    assert told(sweep / "best") == (), "damaged, which nothing here needs"
