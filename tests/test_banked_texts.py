"""Texts of a base in training: those of `transformers.generate` with the adapter in plain PEFT."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import byte_tokenizer, random_examples, tiny_model
from peft import PeftModel
from test_training import weights

from inference.banked import Asked, BankedGenerator, TextsStoppedError
from inference.batch import in_passes, share_slots
from inference.beam_engine import BeamSearcher
from inference.cached_attention import PrefillPass
from inference.engine import TransformersEngine
from inference.kv_cache import KVCache
from inference.room import LENT_LIMITS, TextsMemory
from qlora.config import DecodingSettings, TrialSettings
from qlora.lora.bank import AdapterBank
from qlora.packed.attention import use_packed_attention
from qlora.packed.packing import shared_prefix_length
from qlora.perplexity import adapter_perplexities
from qlora.training import Training
from tuning.model_size import model_size

SETTINGS = [
    TrialSettings(
        learning_rate=0.03, lora_r=4, lora_alpha=32, lora_dropout=0.1, batch_size=4, epochs=4, seed=1
    ),
    TrialSettings(
        learning_rate=0.02, lora_r=8, batch_size=4, epochs=4, seed=2, target_modules=("q_proj", "down_proj")
    ),
]
DECODING = DecodingSettings(num_beams=1, max_new_tokens=12)


def plain_texts(family: str, folder, prompts, ends: list[int]) -> list[str]:
    """One prompt after the other, greedily, by transformers and PEFT."""
    model, tokenizer = tiny_model(family), byte_tokenizer()
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder))
    found = []
    for prompt in prompts:
        out = model.eval().generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=[2, *ends],
            pad_token_id=0,
        )
        found.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip())
    return found


def tiny_bank() -> tuple:
    """A bank with three adapters that have trained apart."""
    model = tiny_model("llama")
    use_packed_attention(model)
    bank = AdapterBank(model, "tiny")
    kinds = [one.model_copy(update={"seed": seed}) for seed, one in enumerate([*SETTINGS, SETTINGS[0]])]
    runs = [Training(bank, random_examples(8, seed=n, vocabulary=250), one) for n, one in enumerate(kinds)]
    for run in runs * 6:
        run.advance(10_000)
    return bank, [run.adapter for run in runs]


@pytest.mark.parametrize(("family", "slots"), [("llama", 32), ("llama", 4), ("llama", 2), ("gemma2", 32)])
def test_texts_are_those_of_transformers_with_the_adapter_in_plain_peft(family, slots, tmp_path, monkeypatch):
    """Between steps of training, which goes on as if no text had been written; of all adapters together."""
    monkeypatch.setitem(LENT_LIMITS, "cpu", replace(LENT_LIMITS["cpu"], max_slots=slots))
    examples = random_examples(8, vocabulary=250)
    prompts = [one.prompt for one in random_examples(5, seed=3, vocabulary=250)]

    def trained(writes: bool) -> tuple[list[Training], list[list[str]]]:
        model = tiny_model(family)
        use_packed_attention(model)
        bank = AdapterBank(model, "tiny")
        generator = BankedGenerator(bank, byte_tokenizer(), DECODING)
        runs, found = [Training(bank, examples, settings) for settings in SETTINGS], []
        for step in range(8):
            for run in runs:
                run.advance(10_000)
            if writes and step in (3, 7):
                adapters = [None, *(run.adapter for run in runs)]
                found = generator.texts(
                    [Asked(one, prompts[:count]) for one, count in zip(adapters, (3, 5, 4), strict=True)]
                )
        assert model.config._attn_implementation == "packed"
        return runs, found

    runs, found = trained(writes=True)
    undisturbed, _ = trained(writes=False)
    for number, (run, other) in enumerate(zip(runs, undisturbed, strict=True)):
        assert torch.equal(weights(run), weights(other))
        run.bank.save(run.adapter, tmp_path / str(number))
        count = (5, 4)[number]
        assert found[1 + number] == plain_texts(family, tmp_path / str(number), prompts[:count], [])
    assert found[0] == plain_texts(family, None, prompts[:3], [])
    assert len({tuple(texts[:3]) for texts in found}) == 3, "or nothing is shown"
    values = adapter_perplexities(runs[0].bank, [(runs[0].adapter, examples)], 10_000)[0]
    assert (
        values == adapter_perplexities(undisturbed[0].bank, [(undisturbed[0].adapter, examples)], 10_000)[0]
    )


def test_many_adapters_share_few_slots_and_each_goes_through_its_own(monkeypatch):
    """One of sixteen writes long texts, and has two slots, when all others are done with theirs."""
    bank, (short, long, _) = tiny_bank()
    prompts = [(*range(40, 52), *one.prompt) for one in random_examples(7, seed=3, vocabulary=250)]
    writes = BankedGenerator(bank, byte_tokenizer(), DECODING).texts
    of_short, of_long = (
        set("".join(texts)) for texts in writes([Asked(short, prompts), Asked(long, prompts)])
    )
    ends = [token for token in range(3, 259) if byte_tokenizer().decode([token]) in of_short - of_long]
    requests = [Asked(short, prompts[number % 2 :], ends) for number in range(15)]
    requests.append(Asked(long, prompts, ends))
    monkeypatch.setitem(LENT_LIMITS, "cpu", replace(LENT_LIMITS["cpu"], max_slots=32))
    together = BankedGenerator(bank, byte_tokenizer(), DECODING).texts(requests)
    assert together == [writes([one])[0] for one in requests]
    assert 2 * len("".join(together[0])) < len("".join(together[-1])), "or nothing is shown"


def test_adapters_share_the_passes_of_prompts_as_those_of_steps(monkeypatch):
    """Two passes fill the slots, of what prompts share and of the rest, however many adapters there are."""
    bank, adapters = tiny_bank()
    prompts = [one.prompt for one in random_examples(4, seed=3, vocabulary=250)]
    filled: list[int] = []
    forward = bank.model.forward

    def counted(*arguments, **named):
        if isinstance(named["cached"], PrefillPass):
            filled.append(named["input_ids"].shape[1])
        return forward(*arguments, **named)

    generator = BankedGenerator(bank, byte_tokenizer(), DECODING)
    generator.texts([Asked(None, prompts)])  # which tries the model first
    monkeypatch.setattr(bank.model, "forward", counted)
    shared = shared_prefix_length(prompts)
    rest = sum(len(prompt) - shared for prompt in prompts)
    for count in (1, 2, 3):
        filled.clear()
        generator.texts([Asked(adapter, prompts) for adapter in adapters[:count]])
        assert filled == [count * shared, count * rest]


@pytest.mark.parametrize(
    ("lengths", "most", "found"),
    [([], 5, []), ([3, 2, 1, 9, 5], 5, [(0, 2), (2, 3), (3, 4), (4, 5)]), ([2, 2], 9, [(0, 2)])],
)
def test_neighbours_go_through_a_pass_together_as_far_as_it_has_room(lengths, most, found):
    assert [(run.start, run.stop) for run in in_passes(lengths, most)] == found


def test_slots_are_shared_by_prompts_and_none_is_left_out_or_over():
    assert share_slots(10, {0: 500, **dict.fromkeys(range(1, 21), 1)}) == [0, *range(1, 10)]
    assert share_slots(500, dict.fromkeys(range(7), 250)).count(3) in (71, 72)
    assert len(share_slots(500, dict.fromkeys(range(7), 250))) == 500
    assert share_slots(9, {2: 1, 5: 3}) == [2, 5, 5, 5]


@pytest.mark.parametrize("whole", [True, False])
def test_memory_that_runs_out_loses_no_text(whole, monkeypatch):
    """Parts have different numbers of prompts left then."""
    bank, adapters = tiny_bank()
    generator = BankedGenerator(bank, byte_tokenizer(), DECODING)
    prompts = [one.prompt for one in random_examples(8, seed=3, vocabulary=250)]
    requests = [Asked(adapters[0], prompts), Asked(adapters[1], prompts[:2]), Asked(None, prompts[:3])]
    expected = generator.texts(requests)
    plain, failed = BeamSearcher._step, []

    def step(self, batch):
        taken = max(count for count, one in zip(batch.steps, batch.examples, strict=True) if one is not None)
        if len(batch.parts) > 3 and (whole or taken > 2):
            failed.append(len(batch.parts))
            raise torch.cuda.OutOfMemoryError
        plain(self, batch)

    monkeypatch.setattr(BeamSearcher, "_step", step)
    assert generator.texts(requests) == expected
    assert failed[0] > 3


def test_the_memory_of_texts_is_what_a_plan_counts(monkeypatch):
    """Of two adapters, with a copy of the slots that are left; no more of it than there is."""
    bank, adapters = tiny_bank()
    prompts = [one.prompt for one in random_examples(4, seed=3, vocabulary=250)]
    made = []
    empty = KVCache.empty.__func__

    def counted(cls, *arguments):
        made.append(empty(cls, *arguments))
        return made[-1]

    generator = BankedGenerator(bank, byte_tokenizer(), DECODING)
    generator.texts([Asked(None, prompts)])  # which tries the model first
    monkeypatch.setattr(KVCache, "empty", classmethod(counted))
    generator.texts([Asked(adapter, prompts) for adapter in adapters[:2]])
    size, slots = model_size(bank.model.config), 2 * len(prompts)
    texts = TextsMemory(
        num_texts=len(prompts),
        longest=max(map(len, prompts)),
        max_new_tokens=DECODING.max_new_tokens,
        vocabulary=size.vocabulary,
        cache_width=size.cache_width,
        pass_width=0,
    )
    (cache,) = (one.num_bytes for one in made)
    logits = 16 * size.vocabulary * slots
    assert texts.count("cpu", 4, 2, 1 << 40) == cache + cache * 6 // slots + logits
    assert texts.count("cpu", 4, 2, cache // 2) <= cache


def test_adapters_that_have_written_texts_are_freed_when_they_leave():
    bank, adapters = tiny_bank()
    generator = BankedGenerator(bank, byte_tokenizer(), DECODING)
    prompts = [one.prompt for one in random_examples(2, seed=3, vocabulary=250)]
    generator.texts([Asked(one, prompts) for one in adapters])
    left = weakref.ref(adapters[1])
    bank.detach(adapters.pop(1))
    gc.collect()
    assert left() is None


def test_texts_end_at_the_tokens_that_end_answers_of_their_prompt():
    model = tiny_model("llama")
    use_packed_attention(model)
    generator = BankedGenerator(AdapterBank(model, "tiny"), byte_tokenizer(), DECODING)
    prompts = [one.prompt for one in random_examples(5, seed=3, vocabulary=250)]
    (whole,) = generator.texts([Asked(None, prompts)])
    ends = [token for token in range(3, 259) if byte_tokenizer().decode([token]) in whole[0][:3]]
    cut = plain_texts("llama", None, prompts, ends)
    both = [Asked(None, prompts), Asked(None, prompts, ends)]
    assert generator.texts(both) == [whole, cut]
    assert generator.texts(both[::-1]) == [cut, whole]
    assert whole != cut


def test_texts_that_nobody_waits_for_are_not_written_to_their_end():
    model = tiny_model("llama")
    use_packed_attention(model)
    generator = BankedGenerator(AdapterBank(model, "tiny"), byte_tokenizer(), DECODING)
    prompts = [one.prompt for one in random_examples(5, seed=3, vocabulary=250)]
    request, asked = Asked(None, prompts), []
    whole = generator.texts([request])
    with pytest.raises(TextsStoppedError, match="after 2 of 10 texts"):
        generator.texts([request, request], is_over=lambda: asked.append(1) or len(asked) == 2)
    assert model.config._attn_implementation == "packed"
    assert generator.texts([request]) == whole


def test_what_the_search_lacks_is_written_by_transformers():
    decoding = DecodingSettings(num_beams=1, max_new_tokens=12, repetition_penalty=1.3)
    model = tiny_model("llama")
    use_packed_attention(model)
    generator = BankedGenerator(AdapterBank(model, "tiny"), byte_tokenizer(), decoding)
    prompts = [one.prompt for one in random_examples(3, seed=3, vocabulary=250)]
    plain = TransformersEngine(tiny_model("llama"), byte_tokenizer(), decoding, 1)
    expected = [text for _, text, _ in sorted(plain.generate(prompts))]
    assert generator.texts([Asked(None, prompts)] * 2) == [expected, expected]
    assert model.config._attn_implementation == "packed"
