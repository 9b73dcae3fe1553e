"""The packed stream gives what padded rows give, however examples are grouped."""

import pytest
import torch
from conftest import CONFIGS, random_examples, tiny_model
from oracles import padded_loss, peft_adapter
from transformers import AutoModelForCausalLM, MambaConfig

from qlora.answer_nll import answer_nll
from qlora.config import TrialSettings
from qlora.data.prompts import EncodedExample
from qlora.packed.attention import use_packed_attention
from qlora.packed.packing import (
    lay_out,
    pack,
    pack_groups,
    shared_prefix_length,
    split_by_budget,
    whole_group,
)


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def with_lora(model):
    adapted = peft_adapter(model, TrialSettings(lora_r=4, lora_dropout=0.0))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    return adapted


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("shared", [1, 24])
def test_loss_and_gradients_equal_padded_rows(family, shared):
    examples = random_examples(6, shared=shared)
    reference = with_lora(tiny_model(family))
    expected = padded_loss(reference, examples)
    expected.backward()
    base = tiny_model(family)
    use_packed_attention(base)
    packed = with_lora(base)
    loss = answer_nll(packed, pack(examples)).mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    error = (gradients(packed) - gradients(reference)).norm() / gradients(reference).norm()
    assert error < 1e-5


def test_the_prefix_stands_once_in_the_stream():
    examples = random_examples(5, shared=20)
    batch = pack(examples)
    prefix = shared_prefix_length([e.prompt for e in examples])
    assert prefix >= 20
    assert batch.num_tokens == prefix + sum(e.num_tokens - prefix for e in examples)
    assert batch.targets_A.tolist() == [token for e in examples for token in e.answer]


def test_parts_of_a_stream_do_not_see_each_other():
    """Several trials' groups in one stream score as each does alone."""
    groups = [
        whole_group(random_examples(count, seed, shared))
        for count, seed, shared in ((3, 0, 20), (1, 1, 5), (4, 2, 1))
    ]
    for family in CONFIGS:
        model = tiny_model(family)
        use_packed_attention(model)
        together = pack_groups(groups)
        alone = torch.cat([answer_nll(model, pack_groups([group])) for group in groups])
        assert lay_out(groups).num_answers == tuple(
            sum(len(e.answer) for e in group.examples) for group in groups
        )
        torch.testing.assert_close(answer_nll(model, together), alone, rtol=1e-5, atol=1e-5)


def test_equal_prompts_keep_a_token_of_their_own():
    """The first answer token is predicted from the last prompt token, so that one can't be in the prefix."""
    examples = [EncodedExample("a", (1, 5, 6), (7, 2)), EncodedExample("b", (1, 5, 6), (8, 9, 2))]
    model = tiny_model("llama")
    expected = padded_loss(model, examples)
    use_packed_attention(model)
    assert pack(examples).prefix_length == 2
    assert answer_nll(model, pack(examples)).mean().item() == pytest.approx(expected.item(), rel=1e-5)


def test_regrouping_changes_nothing():
    examples = random_examples(12)
    model = tiny_model("mistral")
    use_packed_attention(model)
    whole = answer_nll(model, pack(examples)).sum().item()
    for budget in (1, 100, 300):
        groups = split_by_budget(examples, budget)
        assert sorted(name for group in groups for name in group.names) == list(range(12))
        parts = sum(answer_nll(model, pack_groups([group])).sum().item() for group in groups)
        assert parts == pytest.approx(whole, rel=1e-5)


def test_groups_stay_within_the_budget():
    examples = random_examples(30)
    groups = split_by_budget(examples, 200)
    assert len(groups) > 1
    for group in groups:
        assert group.num_tokens == pack_groups([group]).num_tokens
        assert len(group.examples) == 1 or group.num_tokens <= 200


def test_models_that_mix_tokens_elsewhere_are_refused():
    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="mamba"):
        use_packed_attention(AutoModelForCausalLM.from_config(config))


def test_attention_dropout_is_refused():
    model = tiny_model("llama")
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        use_packed_attention(model)


def test_a_call_without_its_batch_is_refused():
    model = tiny_model("llama")
    use_packed_attention(model)
    with pytest.raises(ValueError, match="packed=batch"):
        model(input_ids=torch.tensor([[1, 2, 3]]))
