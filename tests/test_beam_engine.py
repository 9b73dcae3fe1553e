"""The beam engine chooses the tokens that transformers' generate chooses for each prompt alone."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import CONFIGS, random_examples, tiny_model
from oracles import peft_adapter
from peft.tuners.lora import LoraLayer

from inference.beam_engine import BeamSearcher
from inference.engine import generate_options, search_rules
from qlora.base.model import load_base
from qlora.config import BaseModelSettings, DecodingSettings, TrialSettings
from qlora.served import PackedLinear, load_served, quicken

FAMILIES = list(CONFIGS)


def prompts(count: int = 7, shared: int = 12) -> list[tuple[int, ...]]:
    return [example.prompt for example in random_examples(count, shared=shared)]


def model_that_ends(family: str, eos: int | list[int] = 2):
    """EOS has a long row in the head, so that it is often the likeliest or the least likely token: outputs
    end here and there.
    """
    model = tiny_model(family)
    with torch.no_grad():
        model.lm_head.weight[eos] *= 4.0
    model.generation_config.eos_token_id = eos
    return model


def generated(model, prompt: tuple[int, ...], decoding: DecodingSettings) -> list[int]:
    """The oracle: one prompt, alone, under transformers' own attention."""
    model.set_attn_implementation("eager")
    if decoding.seed is not None:
        torch.manual_seed(decoding.seed)
    ids = torch.tensor([prompt], device=model.device)
    eos = model.generation_config.eos_token_id
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **generate_options(decoding)
        )
    tokens = out[0, len(prompt) :].tolist()
    ends = [i for i, token in enumerate(tokens) if token in ([eos] if isinstance(eos, int) else eos)]
    return tokens[: ends[0] + 1] if ends else tokens


def searched(model, texts, decoding: DecodingSettings, **options) -> list[list[int]]:
    searcher = BeamSearcher(model, search_rules(model, decoding), decoding.seed, **options)
    found = dict(searcher.search(texts))
    return [found[i] for i in range(len(texts))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 5, "length_penalty": 0.3},
        {"num_beams": 3, "length_penalty": -0.5},
        {"num_beams": 3, "early_stopping": True},
        {"num_beams": 4, "early_stopping": "never", "length_penalty": 0.6},
        {"num_beams": 3, "min_new_tokens": 6},
    ],
)
def test_tokens_equal_those_of_generate(family, settings):
    model, decoding = model_that_ends(family), DecodingSettings(max_new_tokens=20, **settings)
    texts = prompts()
    expected = [generated(model, text, decoding) for text in texts]
    assert len({len(tokens) for tokens in expected}) > 1, (
        "all outputs end together, so the test would prove little"
    )
    assert searched(model, texts, decoding, max_slots=3) == expected


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_first_tokens_come_from_the_prompts_own_pass(num_beams, length, monkeypatch):
    """An answer of n tokens takes n - 1 decode steps."""
    model, texts, steps = tiny_model("llama"), prompts(), []
    decoding = DecodingSettings(num_beams=num_beams, max_new_tokens=length, min_new_tokens=length)
    expected = [generated(model, text, decoding) for text in texts]
    plain = BeamSearcher._step

    def counted(searcher, batch):
        steps.append(len(batch.parts))
        return plain(searcher, batch)

    monkeypatch.setattr(BeamSearcher, "_step", counted)
    assert searched(model, texts, decoding) == expected
    assert len(steps) == length - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_several_eos_tokens(family):
    model, decoding = model_that_ends(family, [2, 7, 11]), DecodingSettings(max_new_tokens=12)
    assert searched(model, prompts(), decoding) == [generated(model, text, decoding) for text in prompts()]


@pytest.mark.parametrize("sampling", [{"temperature": 0.7, "top_k": 20}, {"top_p": 0.8}, {}])
def test_a_seeded_sample_is_the_one_that_generate_draws(sampling):
    model = model_that_ends("llama")
    decoding = DecodingSettings(num_beams=1, do_sample=True, seed=11, max_new_tokens=12, **sampling)
    assert searched(model, prompts(), decoding, max_slots=2) == [
        generated(model, text, decoding) for text in prompts()
    ]


def test_prompts_that_share_nothing_or_everything_or_stand_alone():
    model, decoding = model_that_ends("llama"), DecodingSettings(max_new_tokens=8)
    for texts in ([(5, 6, 7), (8,), (9, 4)], [(1, 5, 6), (1, 5, 6)], [(1, 5, 6, 9, 9)], [(3,)]):
        assert searched(model, texts, decoding) == [generated(model, text, decoding) for text in texts]


def test_a_searcher_serves_one_call_after_another():
    """The template's cache is kept between calls when it fits, and made anew when it does not."""
    model, decoding = model_that_ends("llama"), DecodingSettings(max_new_tokens=8)
    searcher = BeamSearcher(model, search_rules(model, decoding))
    calls = [prompts(5), prompts(3), [(9, 8, 7), (9, 8)], prompts(4, shared=30)]
    found = [[dict(searcher.search(texts))[i] for i in range(len(texts))] for texts in calls]
    assert found == [
        [generated(tiny, text, decoding) for text in texts]
        for texts in calls
        for tiny in [model_that_ends("llama")]
    ]


def test_out_of_memory_halves_the_slots_and_loses_nothing(monkeypatch):
    model, decoding = model_that_ends("llama"), DecodingSettings(max_new_tokens=8)
    searcher = BeamSearcher(model, search_rules(model, decoding), max_slots=4)
    whole_step = searcher._step

    def step(batch):
        if len(batch.examples) > 2:
            raise torch.cuda.OutOfMemoryError
        whole_step(batch)

    monkeypatch.setattr(searcher, "_step", step)
    found = dict(searcher.search(prompts(9)))
    assert searcher.room.max_slots == 2
    assert [found[i] for i in range(9)] == searched(model_that_ends("llama"), prompts(9), decoding)


def test_what_the_search_lacks_is_left_to_generate():
    model = model_that_ends("llama")
    with pytest.raises(ValueError, match="beam sample"):
        search_rules(model, DecodingSettings(num_beams=3, do_sample=True))
    model.generation_config.repetition_penalty = 1.2
    with pytest.raises(ValueError, match="RepetitionPenalty"):
        search_rules(model, DecodingSettings())


def test_what_was_tuned_is_what_is_served(tiny_base, tmp_path):
    """The served weights are the NF4 values with the adapter added, not those from before quantisation."""
    settings = BaseModelSettings(name=str(tiny_base))
    adapted = peft_adapter(load_base(settings), TrialSettings(lora_r=4, lora_dropout=0.0))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(str(tmp_path))
    served = load_served(settings, str(tmp_path))
    assert not any(isinstance(module, (Linear4bit, LoraLayer)) for module in served.modules())
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        torch.testing.assert_close(served(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_packed_linear_layers_compute_the_same():
    model, ids = tiny_model("qwen2"), torch.arange(3, 40)[None]  # Qwen2 has biases
    with torch.inference_mode():
        expected = model(ids).logits
        quicken(model)
        assert any(isinstance(module, PackedLinear) for module in model.modules())
        torch.testing.assert_close(model(ids).logits, expected)
