"""Over published families: perplexity, training, reloading and beams equal transformers and PEFT."""

import pytest
import torch
from conftest import byte_tokenizer, random_examples
from families import FAMILIES, family_model
from oracles import adamw_of, loop_perplexities, peft_adapter, plain_step
from peft import PeftModel

from inference.engine import make_engine
from qlora.config import DecodingSettings, TrialSettings
from qlora.lora.bank import AdapterBank, linear_layers
from qlora.packed.agreement import pack_attention
from qlora.perplexity import adapter_perplexities, example_perplexities
from qlora.training import Training, advance_together

SAMPLE = ("llama-llama3", "qwen3-moe-mixed", "gemma3", "phi3-longrope", "diffllama")  # the others are slow
EVERY = [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in FAMILIES]
# The cache of the search holds keys and values of one width, for one call of attention a layer.
LEFT_TO_GENERATE = {"diffllama", "deepseek-v2", "deepseek-v3"}
SETTINGS = TrialSettings(learning_rate=0.01, lora_r=4, lora_dropout=0.0, batch_size=4, seed=3)


@pytest.mark.parametrize("name", EVERY)
def test_perplexity_is_that_of_the_models_own_attention(name):
    examples = random_examples(6)
    expected = loop_perplexities(family_model(name), examples)
    model = family_model(name)
    pack_attention(model, name)
    assert example_perplexities(model, examples, 10_000) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_an_adapter_trains_as_in_peft_and_is_loaded_back_by_it(name, tmp_path):
    base = family_model(name).requires_grad_(False)
    pack_attention(base, name)
    run = Training(AdapterBank(base, name), random_examples(8), SETTINGS)
    targets = tuple(linear_layers(family_model(name)))
    named = SETTINGS.model_copy(update={"target_modules": targets})
    plain = adapter_on_plain_layers(name, named)
    optimizer = adamw_of(plain)
    for step in range(2):
        rate = 0.01 * (2 - step) / 2
        loss = plain_step(plain, optimizer, run.batch_at(step), rate, SETTINGS.max_grad_norm)
        assert run.advance(10_000).loss == pytest.approx(loss, rel=1e-4)
    run.bank.save(run.adapter, tmp_path)
    loaded = PeftModel.from_pretrained(family_model(name), tmp_path).eval()
    found = adapter_perplexities(run.bank, [(run.adapter, run.examples)], 10_000)[0]
    assert found == pytest.approx(loop_perplexities(loaded, run.examples), rel=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_layers_that_are_computed_again_change_nothing(name):
    found = []
    for recomputes in (False, True):
        base = family_model(name).requires_grad_(False)
        pack_attention(base, name)
        bank = AdapterBank(base, name)
        assert not recomputes or bank.recompute()
        settings = SETTINGS.model_copy(update={"lora_dropout": 0.1})
        trials = [
            Training(bank, random_examples(8), settings.model_copy(update={"seed": seed})) for seed in (1, 2)
        ]
        losses = [one.loss for _ in range(2) for one in advance_together(trials, 10_000)]
        found.append([*losses, *(trial.adapter.weights.tolist() for trial in trials)])
    assert found[0] == found[1]


def adapter_on_plain_layers(name: str, settings: TrialSettings) -> PeftModel:
    """The oracle: PEFT's adapter on the same layers."""
    return peft_adapter(family_model(name).requires_grad_(False), settings)


@pytest.mark.parametrize("name", EVERY)
def test_beams_are_those_of_generate(name):
    decoding = DecodingSettings(num_beams=3, max_new_tokens=12)
    prompts = [example.prompt for example in random_examples(5, shared=12)]
    model, tokenizer = family_model(name), byte_tokenizer()
    expected = [generated(model, tokenizer, prompt) for prompt in prompts]
    engine = make_engine(family_model(name), tokenizer, decoding)
    assert engine.name.startswith("transformers.generate" if name in LEFT_TO_GENERATE else "beam engine")
    found = {index: text for index, text, _ in engine.generate(prompts)}
    assert [found[index] for index in range(len(prompts))] == expected


@torch.inference_mode()
def generated(model, tokenizer, prompt: tuple[int, ...]) -> str:
    """The oracle: one prompt, alone, under eager attention."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        num_beams=3,
        max_new_tokens=12,
        pad_token_id=0,
        eos_token_id=2,
    )
    return tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip()
