"""evaluate.py: a figure per example and their mean, or one line."""

import json
import os
import sys
from unittest.mock import patch

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from test_inputs import GOOD
from transformers import AutoModelForCausalLM, OPTConfig

import ray_jobs.evaluate
from workflows import session


def evaluated(monkeypatch, base, data, output, *more) -> int:
    options = ("--base-model", base, "--data", data, "--output", output, "--quantization", "none", *more)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, options)])
    # a command makes its process's environment its own
    with patch.dict(os.environ), pytest.raises(SystemExit) as end:
        session.run(ray_jobs.evaluate.main)
    return end.value.code or 0


def test_a_figure_that_is_no_number_is_not_written(monkeypatch, capsys, tmp_path, write_rows, tiny_base):
    data, output = write_rows(GOOD), tmp_path / "result.json"
    assert evaluated(monkeypatch, tiny_base, data, output) == 0
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["count"] == 2
    assert found["mean_perplexity"] == pytest.approx(sum(found["perplexities"].values()) / 2)
    output.unlink()
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)  # so sure of other tokens that a perplexity is beyond all numbers
    model.save_pretrained(tmp_path / "broken")
    byte_tokenizer().save_pretrained(tmp_path / "broken")
    capsys.readouterr()
    assert evaluated(monkeypatch, tmp_path / "broken", data, output) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("failed: the perplexity of 2 of 2 ")
    assert not output.exists()


@pytest.fixture(scope="module")
def short_base(tmp_path_factory):
    """A base with learned positions for 160 tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 32}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 160}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    folder = tmp_path_factory.mktemp("base") / "opt"
    AutoModelForCausalLM.from_config(OPTConfig(**sizes, **heads, **tokens)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_examples_are_cut_where_a_base_has_no_more_positions(
    short_base, monkeypatch, capsys, tmp_path, write_rows
):
    """The cut is told; only a prompt that leaves no answer token is refused."""
    template = tmp_path / "plain.yaml"
    template.write_text("template: '{instruction}'", encoding="utf-8")
    options = ("--prompt", template)
    data, output = write_rows([{"instruction": "x", "output": "y" * 500}, *GOOD]), tmp_path / "result.json"
    assert evaluated(monkeypatch, short_base, data, output, *options) == 0
    assert capsys.readouterr().out.startswith("1 cut at 160 tokens\n")
    found = json.loads(output.read_text())
    assert found["settings"]["max_length"] == 160
    same = write_rows([{"instruction": "x", "output": "y" * 158}], "same.json")
    assert evaluated(monkeypatch, short_base, same, output, *options) == 0
    whole = json.loads(output.read_text())["perplexities"]["0"]
    assert found["perplexities"]["0"] == pytest.approx(whole, rel=1e-5), "no EOS is scored behind a cut"
    long = write_rows([{"instruction": "x" * 160, "output": "y"}], "long.json")
    assert evaluated(monkeypatch, short_base, long, output, *options) == 2
    error = capsys.readouterr().err
    assert "the prompt has 161 tokens, which leaves no answer within 160, which is all that this" in error


def test_a_shorter_length_is_asked_for(tiny_base, monkeypatch, capsys, tmp_path, write_rows):
    template = tmp_path / "plain.yaml"
    template.write_text("template: '{instruction}'", encoding="utf-8")
    data, output = write_rows([{"instruction": "x", "output": "y" * 50}]), tmp_path / "result.json"
    options = ("--prompt", template, "--max-length", "12")
    assert evaluated(monkeypatch, tiny_base, data, output, *options) == 0
    assert "1 cut at 12 tokens" in capsys.readouterr().out
    assert json.loads(output.read_text())["settings"]["max_length"] == 12
