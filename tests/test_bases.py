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
from conftest import byte_tokenizer, command, write_course
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.base.model import check_vocabulary, load_base, load_config, load_tokenizer
from qlora.base.reference import base_files_digest, base_weights_digest
from qlora.config import BaseModelSettings, InputError
from qlora.packed.agreement import pack_attention
from workflows.checked_base import load_facts

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


def test_a_base_of_other_weights_is_told_by_their_digest(tiny_base, tmp_path):
    """However they are cut into files."""
    folder, before = tmp_path / "base", base_weights_digest(str(tiny_base))
    shutil.copytree(tiny_base, folder)
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    names = sorted(weights)
    path.unlink()
    for number, some in enumerate((names[::2], names[1::2])):
        part = folder / f"part-{number}.safetensors"
        save_file({name: weights[name] for name in some}, part, metadata={"format": "pt"})
    assert base_weights_digest(str(folder)) == before
    changed = {name: weights[name] for name in names[1::2]}
    changed[names[1]] = changed[names[1]] + 1e-3
    save_file(changed, folder / "part-1.safetensors", metadata={"format": "pt"})
    assert base_weights_digest(str(folder)) != before
    for header in (
        '{"a": {"data_offsets": [-9, 4]}}',
        '{"a": {"data_offsets": [0, 99999999999]}}',
        "[1",
        "{",
    ):
        content = len(header).to_bytes(8, "little") + header.encode() + bytes(40)
        (folder / "part-1.safetensors").write_bytes(content)  # damaged, as whoever loads it says
        assert base_weights_digest(str(folder)) != before


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


@pytest.mark.parametrize("form", ["nf4", ["nf4"], 4])
def test_a_quantisation_that_is_no_mapping_is_told(form, tiny_base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": form}))
    with pytest.raises(InputError, match=r"config\.json is no good: .*to_dict"):
        load_config(str(folder))
