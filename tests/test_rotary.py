"""Ropes whose frequencies depend on a pass: examples end before they do."""

import pytest
import torch
from conftest import byte_tokenizer, random_examples
from families import family_model
from oracles import loop_perplexities
from transformers import AutoModelForCausalLM

from qlora.base.model import length_reason, load_base, load_config, longest_example
from qlora.config import BaseModelSettings
from qlora.packed.agreement import pack_attention
from qlora.perplexity import example_perplexities

CPU = torch.device("cpu")


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
