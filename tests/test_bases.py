"""Bases that would be wrong are refused in one line: before work starts where headers show it, else when
they are loaded.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, command, random_examples, write_course
from families import family_model
from oracles import loop_perplexities
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qlora.base.model import (
    check_vocabulary,
    length_reason,
    load_base,
    load_config,
    load_tokenizer,
    longest_example,
)
from qlora.base.reference import base_files_digest
from qlora.config import BaseModelSettings, InputError
from qlora.packed.agreement import pack_attention
from qlora.packed.attention import check_attention
from qlora.perplexity import example_perplexities
from tuning.model_size import model_size
from workflows.checked_base import load_facts, trainable_size

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]


@pytest.fixture
def altered(tiny_base, tmp_path):
    """Copy the tiny base with other weights or another config, and return its settings."""

    def make(
        change_weights: Callable[[Weights], Weights] | None = None,
        change_config: dict[str, Any] | None = None,
        quantization: str = "none",
    ) -> BaseModelSettings:
        folder = tmp_path / "altered"
        shutil.copytree(tiny_base, folder)
        if change_weights:
            weights = change_weights(load_file(folder / "model.safetensors"))
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **(change_config or {})}))
        return BaseModelSettings(name=str(folder), quantization=quantization)

    return make


def without_a_layer(weights: Weights) -> Weights:
    return {key: tensor for key, tensor in weights.items() if "layers.1.mlp.up_proj" not in key}


def with_another_prefix(weights: Weights) -> Weights:
    return {f"wrapped.{key}": tensor for key, tensor in weights.items()}


def with_one_more(weights: Weights) -> Weights:
    return {**weights, "v_head.weight": torch.ones(1, 64)}


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    ("change_weights", "change_config", "words"),
    [
        (without_a_layer, {}, r"1 weight is missing, such as model\.layers\.1\.mlp\.up_proj\.weight"),
        (with_another_prefix, {}, r"21 weights are missing, such as lm_head\.weight"),
        (with_one_more, {}, r"1 weight is left over, such as v_head\.weight"),
        (None, {"num_hidden_layers": 3}, "9 weights are missing"),
        (None, {"num_hidden_layers": 1}, "9 weights are left over"),
        (None, {"vocab_size": 310}, "is 300 x 64, and should be 310 x 64 by config.json"),
        (None, {"intermediate_size": 128}, "should be .*128.* by config.json"),
    ],
)
def test_weights_and_config_that_do_not_fit(
    altered, quantization, change_weights, change_config, words, capfd
):
    settings = altered(change_weights, change_config, quantization)
    for load in (lambda: load_facts(settings, is_packed=True), lambda: load_base(settings, CPU)):
        with pytest.raises(InputError, match=words):
            load()
    assert "MISSING" not in capfd.readouterr().err  # transformers' own report


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "x"}, "config.json is no good: Field 'hidden_size' expected int, got str"),
        ({"vocab_size": None}, "config.json is no good: Field 'vocab_size' expected int"),
        ({"num_attention_heads": 7}, "config.json is no good: The hidden size .* is not a multiple"),
        ({"hidden_act": "nonsense"}, r"config.json describes no model: KeyError\('nonsense'\)"),
        ({"rope_parameters": {"rope_type": "nonsense"}}, "config.json describes no model: .*nonsense"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "can't be loaded: .*Missing required keys"),
    ],
)
def test_a_config_that_describes_no_model(altered, change, words):
    with pytest.raises(InputError, match=words):
        load_facts(altered(change_config=change), is_packed=True)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(altered, quantization, value):
    def spoil(weights: Weights) -> Weights:
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        return weights

    settings = altered(spoil, quantization=quantization)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        load_base(settings, CPU)


def test_logits_that_are_no_numbers(altered):
    def enlarge(weights: Weights) -> Weights:
        weights["lm_head.weight"][7] = 3e38
        return weights

    settings = altered(enlarge)
    with pytest.raises(InputError, match="logits are no finite numbers"):
        pack_attention(load_base(settings, CPU), settings.name)


def test_a_base_in_several_files_is_looked_at_whole(tiny_base, tmp_path):
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(folder, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(folder)
    settings = BaseModelSettings(name=str(folder), quantization="none")
    load_facts(settings, is_packed=True)
    load_base(settings, CPU)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    spoilt = {key: torch.full_like(tensor, torch.nan) for key, tensor in load_file(shards[-1]).items()}
    save_file(spoilt, shards[-1], metadata={"format": "pt"})
    with pytest.raises(InputError, match="holds NaN"):
        load_base(settings, CPU)


@pytest.mark.parametrize(
    "change",
    [
        lambda base: base.joinpath("chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
        lambda base: base.joinpath("tokenizer_config.json").write_text("{}"),
        lambda base: base.joinpath("config.json").write_text(
            base.joinpath("config.json").read_text().replace("4096", "2048")
        ),
        lambda base: save_file(
            {"lm_head.weight": torch.zeros(3)}, base / "model.safetensors", metadata={"format": "pt"}
        ),
    ],
    ids=["chat template", "tokenizer", "config", "weights"],
)
def test_a_base_of_other_files_is_told_by_its_digest(tiny_base, tmp_path, change):
    """Read from what tokens and shapes a base has; weights are told when an adapter is registered."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    before = base_files_digest(str(folder))
    (folder / "README.md").write_text("words")
    (folder / "generation_config.json").write_text("{}")
    assert base_files_digest(str(folder)) == before == base_files_digest(str(tiny_base))
    change(folder)
    assert base_files_digest(str(folder)) != before


def test_a_tokenizer_with_more_tokens_than_embeddings(altered):
    settings = altered()
    tokenizer = load_tokenizer(settings.name)
    check_vocabulary(settings, load_config(settings.name), tokenizer)
    tokenizer.add_tokens([f"<new{n}>" for n in range(60)])
    tokenizer.save_pretrained(settings.name)
    with pytest.raises(InputError, match=r"goes up to token 3\d\d, and its config has embeddings for 300"):
        load_facts(settings, is_packed=False)


def quantised(tiny_base: Path, folder: Path, kind: str) -> Path:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_base, quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_in_nf4_is_worked_with_as_nf4(tiny_base, tmp_path):
    folder = quantised(tiny_base, tmp_path / "nf4", "nf4")
    settings = BaseModelSettings(name=str(folder))
    load_facts(settings, is_packed=True)
    ids = torch.tensor([[1, 5, 9, 30, 7]])
    expected = load_base(BaseModelSettings(name=str(tiny_base)), CPU)(ids).logits
    torch.testing.assert_close(load_base(settings, CPU)(ids).logits, expected)
    plain = settings.model_copy(update={"quantization": "none"})
    for load in (lambda: load_facts(plain, is_packed=False), lambda: load_base(plain, CPU)):
        with pytest.raises(InputError, match="stored in NF4; use quantization nf4"):
            load()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_folder_in_another_form_is_refused(tiny_base, tmp_path, quantization):
    settings = BaseModelSettings(
        name=str(quantised(tiny_base, tmp_path / "fp4", "fp4")), quantization=quantization
    )
    for load in (lambda: load_facts(settings, is_packed=False), lambda: load_base(settings, CPU)):
        with pytest.raises(InputError, match="quantised by bitsandbytes, and not in NF4"):
            load()


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
        (
            "lfm2",
            {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
            "layers of type conv",
        ),
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


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rows_beside_longer_ones_score_as_alone(kind, tmp_path):
    """These ropes choose all rows' frequencies by the longest of a pass: examples end before that matters."""
    model = family_model("phi3-longrope" if kind == "longrope" else "llama-tied")
    config = model.config
    if kind == "dynamic":
        config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        config.max_position_embeddings = 128
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    assert longest_example(config, 2048) == 128
    assert "behind which this base turns positions by other" in length_reason(config, 2048)
    assert longest_example(config, 100) == 100
    assert length_reason(config, 100) == ""
    examples = random_examples(4) + random_examples(1, seed=9, shared=90)
    assert max(example.num_tokens for example in examples) <= 128
    own = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    expected = loop_perplexities(own, examples)
    loaded = load_base(BaseModelSettings(name=str(tmp_path), quantization="none"), CPU)
    loaded(torch.ones(1, 300, dtype=torch.long))  # a long row before changes nothing after
    pack_attention(loaded, "a base")
    assert example_perplexities(loaded, examples, 10_000) == pytest.approx(expected, rel=1e-4)


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


@pytest.mark.slow
def test_every_command_looks_at_the_weights_first(project, altered, tmp_path):
    base = altered(with_another_prefix).name
    write_course(tmp_path)
    rows, out = str(tmp_path / "public.json"), str(tmp_path / "out.json")
    common = ("--base-model", base, "--quantization", "none", "--output", out)
    commands = {
        "tune": ("--space", "space.yaml", "--dry-run", "--set", f"base_model.name={base}"),
        "evaluate": (*common, "--data", rows),
        "batch_infer": (*common, "--input", rows),
    }
    for script, arguments in commands.items():
        process = command(project, script, *arguments)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 2, printed
        assert "error: " in printed
        assert "weights are missing" in printed
    assert not Path(out).exists()
