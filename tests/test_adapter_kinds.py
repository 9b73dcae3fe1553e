"""Adapters of PEFT that are not two matrices beside a weight of the base as it is: as PEFT, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_examples, tiny_model
from oracles import loop_perplexities
from peft import LoraConfig, PeftModel, get_peft_model

from qlora.config import BaseModelSettings, InputError
from qlora.lora.peft_folder import check_adapter
from qlora.served import load_merged
from workflows.sweep.starting_point import starting_point


def adapter(folder: Path, base: Path, options: dict[str, Any]) -> Path:
    """Save an adapter as PEFT makes it, with products that are not zero."""
    torch.manual_seed(1)
    model = tiny_model("llama")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**{**config, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, "base_model_name_or_path": str(base)}))
    return folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "pissa"}, "begun by pissa, which changes the base"),
        ({"init_lora_weights": "pissa_niter_2"}, "begun by pissa_niter_2, which changes the base"),
        ({"init_lora_weights": "olora"}, "begun by olora, which changes the base"),
        ({"lora_bias": True}, "asks for lora_bias"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "asks for layer_replication"),
        ({"alora_invocation_tokens": [5, 6]}, "asks for alora_invocation_tokens"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_name(tiny_base, tmp_path, options, words):
    folder = adapter(tmp_path / "adapter", tiny_base, options)
    with pytest.raises(InputError, match=words):
        check_adapter(folder)
    with pytest.raises(InputError, match=words):
        starting_point(str(folder))
    with pytest.raises(InputError, match=words):
        load_merged(BaseModelSettings(name=str(tiny_base), quantization="none"), str(folder))


@pytest.mark.parametrize(
    ("options", "unknown"),
    [
        ({}, ""),
        ({"init_lora_weights": "gaussian"}, ""),
        ({"init_lora_weights": "orthogonal"}, ""),
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}, "alpha_pattern, rank_pattern"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"exclude_modules": ["model.layers.0.self_attn.v_proj"]}, "exclude_modules"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_other_settings_are_served_as_peft_does_and_are_no_start(tiny_base, tmp_path, options, unknown):
    folder = adapter(tmp_path / "adapter", tiny_base, options)
    examples = random_examples(4)
    expected = loop_perplexities(PeftModel.from_pretrained(tiny_model("llama"), folder).eval(), examples)
    served = load_merged(BaseModelSettings(name=str(tiny_base), quantization="none"), str(folder))
    assert loop_perplexities(served, examples) == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(loop_perplexities(tiny_model("llama"), examples), rel=1e-3)
    if unknown:
        with pytest.raises(InputError, match=f"has {unknown}, which trials don't have"):
            starting_point(str(folder))
    else:
        assert starting_point(str(folder)).settings["lora_r"] == 4
