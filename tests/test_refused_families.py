"""Families whose results would not be exact, or that have nothing to train, are refused by their config; of
mixtures, attention alone is trained.
"""

import pytest
import torch
from conftest import byte_tokenizer, command
from families import family_model
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.config import InputError
from qlora.packed.attention import check_attention
from tuning.model_size import model_size
from workflows.checked_base import trainable_size

LFM2 = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("bloom", {}, "AttentionInterface"),
        ("falcon", {}, "AttentionInterface"),
        ("mpt", {}, "AttentionInterface"),
        ("mamba", {}, "AttentionInterface"),
        ("gpt_oss", {"num_local_experts": 4, "intermediate_size": 64}, "doesn't compute s_aux"),
        ("llama4_text", {"num_local_experts": 4, "intermediate_size": 64}, "chunked_attention"),
        ("lfm2", LFM2, "layers of type conv"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout"),
    ],
)
def test_families_that_would_not_be_exact_are_refused_by_their_config(family, options, words):
    with pytest.raises(InputError, match=words):
        check_attention(AutoConfig.for_model(family, **SMALL, **options), "a base")


def test_a_base_without_layers_for_an_adapter_is_refused():
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=300)
    with pytest.raises(InputError, match="a base: gpt2 has no linear layers for an adapter to target"):
        trainable_size(config, "a base")


def test_a_mixtures_routers_and_experts_get_no_adapter():
    for name in ("glm4-moe", "qwen2-moe", "phimoe", "hunyuan-moe"):
        targets = {layer.rpartition(".")[2] for layer in model_size(family_model(name).config).layers}
        assert targets == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "no linear layers for an adapter to target"),
        pytest.param("lfm2", {**SMALL, **LFM2}, "layers of type conv", marks=pytest.mark.slow),
    ],
)
def test_a_sweep_of_such_a_base_ends_before_it_begins(project, tmp_path, family, options, words):
    folder = tmp_path / family
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{"vocab_size": 300, **options})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    arguments = ("--space", "space.yaml", "--set", f"base_model.name={folder}", "--name", family)
    process = command(project, "tune", *arguments, "--dry-run")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2, out
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in out
    assert not (project / "results" / family).exists()
