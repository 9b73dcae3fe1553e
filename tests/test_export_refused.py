"""export.py refuses what can't be exported before anything is loaded or written, and names it."""

import json
import shutil

import pytest
import torch
from conftest import tiny_model
from export_parts import EXTENDED, ROWS, byte_level
from peft import LoraConfig, get_peft_model
from test_inputs import nothing_heavy_happens, refused  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM

import ray_jobs.export


def write_adapter(base, folder, **settings):
    """Write a fresh adapter of a base, without its weights."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    adapted = get_peft_model(
        model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "k_proj"], **settings})
    )
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


def write_base(folder, config, tokenizer=None):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (tokenizer or byte_level()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("export") / "llama", EXTENDED["llama"])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base):
    return write_adapter(base, tmp_path_factory.mktemp("export") / "adapter")


@pytest.fixture
def rows(write_rows):
    return write_rows(ROWS)


REFUSED = {
    "an option of another format": (
        ("--format", "merged", "--rank", "2"),
        "--rank: belongs to --format vllm",
    ),
    "a type of another format": (
        ("--format", "vllm", "--gguf-type", "f16"),
        "--gguf-type: belongs to --format",
    ),
    "a rank above the adapter's": (("--format", "vllm", "--rank", "5"), "5 is more than 4"),
    "what is so already": (
        ("--format", "merged", "--original-weights", "--quantization", "none"),
        "--original-weights: is how the adapter was tuned",
    ),
}


@pytest.mark.parametrize(("options", "problem"), REFUSED.values(), ids=REFUSED)
def test_bad_options_are_refused(options, problem, capsys, monkeypatch, adapter, rows, tmp_path):
    arguments = ("--model", adapter, "--output", tmp_path / "out", "--data", rows, *options)
    assert problem in refused(ray_jobs.export, capsys, monkeypatch, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_stays_as_it_is(capsys, monkeypatch, adapter, rows, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    arguments = ("--model", adapter, "--output", tmp_path / "out", "--format", "vllm")
    error = refused(ray_jobs.export, capsys, monkeypatch, *arguments, "--data", rows)
    assert "is there already; name a folder that is not" in error
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    error = refused(ray_jobs.export, capsys, monkeypatch, *arguments)
    assert error.startswith("error: --data: is missing")


@pytest.mark.parametrize("format_", ["merged", "vllm", "gguf"])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, 'bias "all"'),
    ],
)
def test_adapters_of_more_than_lora_are_refused_by_name(
    format_, changes, named, capsys, monkeypatch, base, adapter, rows, tmp_path
):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    arguments = ("--model", folder, "--output", tmp_path / "out", "--data", rows, "--format", format_)
    assert f"has {named}, which can't be exported" in refused(
        ray_jobs.export, capsys, monkeypatch, *arguments
    )


def test_ranks_that_vllm_does_not_read_are_refused(capsys, monkeypatch, base, rows, tmp_path):
    folder = write_adapter(base, tmp_path / "adapter", rank_pattern={"k_proj": 6})
    arguments = ("--model", folder, "--output", tmp_path / "out", "--data", rows, "--format", "vllm")
    error = refused(ray_jobs.export, capsys, monkeypatch, *arguments)
    assert "has rank_pattern, which vLLM does not read; give --rank 6" in error


def config_of(family, **changes):
    config = EXTENDED[family].to_dict() | changes
    return type(EXTENDED[family])(**{key: value for key, value in config.items() if key != "model_type"})


def rope(kind, **more):
    return {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, **more}


NOT_IN_GGUF = {
    "a family": (
        lambda: tiny_model("gemma2").config,
        "gemma2 can't be exported as gguf, which is done for llama,",
    ),
    "dynamic positions": (
        lambda: config_of("llama", rope_parameters=rope("dynamic")),
        "are scaled as dynamic",
    ),
    "yarn of its own": (
        lambda: config_of("qwen2", rope_parameters=rope("yarn", beta_fast=16.0)),
        "its yarn has beta_fast",
    ),
    "llama 3's positions elsewhere": (
        lambda: config_of("qwen2", rope_parameters=EXTENDED["llama3"].rope_parameters),
        "are scaled as llama3",
    ),
    "an activation": (lambda: config_of("llama", hidden_act="gelu"), "its activation is gelu"),
    "a window": (lambda: config_of("mistral", sliding_window=16), "has a sliding window of 16 tokens"),
    "gemma of another scale": (
        lambda: config_of("gemma3", query_pre_attn_scalar=24),
        "its query_pre_attn_scalar is 24",
    ),
    "gemma of other layers": (
        lambda: config_of("gemma3", layer_types=["full_attention"] * 6),
        "not every 6th of its layers is global",
    ),
}


@pytest.mark.parametrize(("config", "problem"), NOT_IN_GGUF.values(), ids=NOT_IN_GGUF)
def test_bases_that_gguf_can_not_say_are_refused_by_name(
    config, problem, capsys, monkeypatch, rows, tmp_path
):
    base = write_base(tmp_path / "base", config())
    folder = write_adapter(base, tmp_path / "adapter")
    arguments = ("--model", folder, "--output", tmp_path / "out", "--data", rows, "--format", "gguf")
    error = refused(ray_jobs.export, capsys, monkeypatch, *arguments)
    assert problem in error
    assert "use --format merged" in error


def test_a_tokenizer_that_splits_by_no_known_rule_is_refused(capsys, monkeypatch, rows, tmp_path):
    base = write_base(tmp_path / "base", EXTENDED["llama"], byte_level(r"[aeiou]+|[^aeiou]+"))
    folder = write_adapter(base, tmp_path / "adapter")
    arguments = ("--model", folder, "--output", tmp_path / "out", "--data", rows, "--format", "gguf")
    error = refused(ray_jobs.export, capsys, monkeypatch, *arguments)
    assert "splits text in a way that GGUF has no name for" in error


def test_a_disk_that_is_too_small_is_told_before_work(
    capsys, monkeypatch, adapter, rows, tmp_path, tiny_base
):
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=100))
    options = ("--base-model", tiny_base, "--output", tmp_path / "out", "--data", rows, "--format", "merged")
    error = refused(ray_jobs.export, capsys, monkeypatch, "--model", adapter, *options)
    assert "GiB free, and the export takes" in error


def test_a_link_that_leads_nowhere_is_there_already(capsys, monkeypatch, adapter, rows, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    arguments = ("--model", adapter, "--output", tmp_path / "out", "--format", "vllm", "--data", rows)
    assert "is there already" in refused(ray_jobs.export, capsys, monkeypatch, *arguments)
