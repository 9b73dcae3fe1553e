"""evaluate.py: a figure per example and their mean, or one line."""

import json
import os
import sys
from unittest.mock import patch

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from test_inputs import GOOD

import ray_jobs.evaluate
from workflows import session


def evaluated(monkeypatch, base, data, output) -> int:
    options = ("--base-model", base, "--data", data, "--output", output, "--quantization", "none")
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
        model.lm_head.weight[3].fill_(torch.nan)
    model.save_pretrained(tmp_path / "broken")
    byte_tokenizer().save_pretrained(tmp_path / "broken")
    capsys.readouterr()
    assert evaluated(monkeypatch, tmp_path / "broken", data, output) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("failed: the perplexity of 2 of 2 ")
    assert not output.exists()
