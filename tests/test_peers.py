"""Benchmarks stand beside peers where these are installed, on bases of any size."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import byte_tokenizer

from benchmarks import models, peers
from benchmarks.coresident import main as coresident
from benchmarks.models import load_for_work, load_nf4

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Options:
    shape, tokenizer, base_model, within = "tiny", "", "", None


@pytest.fixture
def tiny_shape(monkeypatch):
    monkeypatch.setitem(models.SHAPES, "tiny", TINY)


def test_a_peer_that_is_missing_or_fails_is_told_on_a_line(capfd, monkeypatch, tmp_path):
    assert peers.ask("no_such_peer", {}) is None
    assert "no_such_peer is not installed here" in capfd.readouterr().err
    (tmp_path / "unsloth.py").write_text("raise RuntimeError('needs a GPU')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert peers.ask("unsloth", {"examples": []}) is None
    told = capfd.readouterr().err
    assert "needs a GPU" in told and "unsloth failed with exit code 1" in told


@pytest.mark.usefixtures("tiny_shape")
def test_random_weights_in_nf4_compute_what_those_values_would():
    """They are drawn layer by layer, so that a size that memory holds in NF4 alone can be measured."""
    model, ids = load_nf4(Options), torch.arange(3, 20, device=models.default_device())[None]
    found = model(ids).logits
    linears = [one for one in model.modules() if isinstance(one, torch.nn.Linear)]
    assert sum(isinstance(one, Linear4bit) for one in linears) == len(linears) - 1, "all but the head"
    assert not any(one.is_meta for one in model.state_dict().values())
    assert found.isfinite().all() and found.std() > 0.01
    other = load_for_work(Options)
    assert not any(isinstance(one, Linear4bit) for one in other.modules()), "memory has room for it"
    assert other(ids).logits.shape == found.shape


@pytest.mark.usefixtures("tiny_shape")
def test_a_shape_is_measured_beside_no_baseline_and_no_peer(monkeypatch, capsys, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    command = [
        "coresident.py", "--shape", "tiny", "--tokenizer", str(tmp_path), "--trials", "1", "--steps", "1",
        "--no-baseline", "--peer", "unsloth", "--lora-r", "4", "--recompute",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr(peers, "_is_installed", lambda package: False)
    coresident()
    told = capsys.readouterr()
    assert "unsloth is not installed here" in told.err
    assert '"baseline": null' in told.out and '"tokens_per_second"' in told.out
