"""What runs on a GPU only: FlashAttention over packed rows, the decode kernel, recorded steps.

`pytest -m gpu` on such a machine.
"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, byte_tokenizer, random_examples, tiny_model
from oracles import padded_loss
from peft import PeftModel
from test_beam_engine import generated, model_that_ends, prompts, searched
from test_packing import gradients, with_lora
from transformers.models.llama import modeling_llama

from inference.banked import Asked, BankedGenerator
from qlora import recorded_passes
from qlora.answer_nll import answer_nll
from qlora.base.device import to_host
from qlora.config import BaseModelSettings, DecodingSettings, TrialSettings
from qlora.lora.average import attach_update
from qlora.lora.bank import AdapterBank
from qlora.packed.attention import use_packed_attention
from qlora.packed.flash_attention import flash_attend, flash_attend_stream, supports
from qlora.packed.packing import pack, pack_groups, whole_group
from qlora.packed.stream import Rows
from qlora.perplexity import adapter_perplexities
from qlora.training import Training, advance_together

lora_kernels = pytest.importorskip("qlora.lora.kernels", reason="Triton comes with torch's CUDA builds only")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def own_rotary_embedding(monkeypatch):
    """Liger replaces a family's: no test is to see what another one replaced."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)


def plain_attention(q_SHD, k_SKD, v_SKD, k_PKD, v_PKD, rows, scale):
    """Row by row, all keys side by side, in float64."""
    outs, start, p = [], 0, rows.prefix_length
    groups = q_SHD.shape[1] // k_SKD.shape[1]
    for length in rows.lengths:
        q = q_SHD[start : start + length].double().transpose(0, 1)
        k, v = (
            torch.cat([prefix, own[start : start + length]])
            .double()
            .transpose(0, 1)
            .repeat_interleave(groups, 0)
            for prefix, own in ((k_PKD, k_SKD), (v_PKD, v_SKD))
        )
        hidden = torch.ones(length, p + length, dtype=torch.bool, device=q.device).triu(p + 1)
        outs.append(
            ((q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)
        )
        start += length
    return torch.cat(outs)


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("prefix", [0, 37])
@pytest.mark.parametrize("width", [64, 128])
def test_flash_attention_behind_a_stored_prefix_equals_plain_attention(kv_heads, prefix, width):
    """To bfloat16's rounding of about 2**-8."""
    rows = Rows((5, 130, 1, 64), prefix, CUDA)
    generator = torch.Generator(CUDA).manual_seed(0)
    shapes = [(rows.num_tokens, 8), *[(rows.num_tokens, kv_heads)] * 2, *[(prefix, kv_heads)] * 2]
    tensors = [torch.randn(*shape, width, generator=generator, device=CUDA).bfloat16() for shape in shapes]
    assert supports(tensors[0], 167, None, None)
    found, expected = flash_attend(*tensors, rows, width**-0.5), plain_attention(*tensors, rows, width**-0.5)
    assert (found.double() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("by_head", [False, True])
def test_flash_attention_over_a_packed_batch_equals_plain_attention(kv_heads, num_parts, by_head):
    """Output and gradients, to bfloat16's rounding; also where a family puts heads one behind the other."""
    groups = [whole_group(random_examples(4, seed=n, shared=(20, 5, 45)[n])) for n in range(num_parts)]
    if num_parts > 1:
        groups[1] = replace(groups[1], prefix_length=0)  # a group may share nothing
    batch = pack_groups(groups, CUDA)
    generator = torch.Generator(CUDA).manual_seed(0)
    tensors = [
        torch.randn(batch.num_tokens, heads, 64, generator=generator, device=CUDA).bfloat16().requires_grad_()
        for heads in (8, kv_heads, kv_heads)
    ]
    if by_head:
        turned = [one.detach().transpose(0, 1).contiguous() for one in tensors]
        tensors = [one.transpose(0, 1).requires_grad_() for one in turned]
    outs = []
    for part in batch.parts:
        prefix, suffix = slice(part.start, part.suffix_start), slice(part.suffix_start, part.end)
        q, k, v = tensors
        outs += [
            plain_attention(q[prefix], k[prefix], v[prefix], k[:0], v[:0], part.prefix, 0.125),
            plain_attention(q[suffix], k[suffix], v[suffix], k[prefix], v[prefix], part.suffixes, 0.125),
        ]
    expected = torch.cat(outs)
    found = flash_attend_stream(*tensors, batch.stretches, 0.125)
    grad = torch.randn(found.shape, generator=generator, device=CUDA)
    ours = [found, *torch.autograd.grad(found, tensors, grad.bfloat16())]
    theirs = [expected, *torch.autograd.grad(expected, tensors, grad.double())]
    for own, other in zip(ours, theirs, strict=True):
        assert (own.double() - other).norm() < 1e-2 * other.norm()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_trials_together_equal_trials_alone_on_a_gpu(family):
    """In float32, where nothing hides behind rounding; in training that moves, with dropout."""
    from test_bank import TRIALS

    examples = [random_examples(10, seed=number, shared=10 + number) for number in range(4)]
    alone = [Training(gpu_bank(family), examples[n], TRIALS[n]) for n in range(4)]
    expected = [[run.advance(10_000).loss for _ in range(2)] for run in alone]
    bank = gpu_bank(family)
    together = [Training(bank, examples[n], TRIALS[n]) for n in range(4)]
    found = [[result.loss for result in advance_together(together, budget)] for budget in (10_000, 150)]
    for number in range(4):
        assert [losses[number] for losses in found] == pytest.approx(expected[number], rel=1e-4)
        here, there = together[number].adapter.weights, alone[number].adapter.weights
        assert (here - there).norm() < 1e-3 * there.norm()


def test_recorded_passes_equal_launched_ones():
    """Losses, gradients and perplexities of trials that come and go, in bfloat16, where FlashAttention is: up
    to rounding, since a recording's kernels add up in another order. The first trial leaves layers alone
    that later ones target.
    """
    from test_bank import TRIALS

    public = random_examples(6, seed=9)
    numbers, gradients = {}, {}
    for is_recorded in (False, True):
        bank = gpu_bank("llama", torch.bfloat16)
        bank.recorder = recorded_passes.Recorder(bank)
        if not is_recorded:
            bank.recorder.stop()
        trainings, numbers[is_recorded], gradients[is_recorded] = {}, [], []
        for there, budget in (
            ((3,), 9999),
            ((3,), 9999),
            (range(4), 9999),
            (range(2), 9999),
            (range(4), 150),
            (range(1, 4), 9999),
        ):
            for number in there:
                if number not in trainings:
                    trainings[number] = Training(
                        bank, random_examples(10, seed=number, shared=10 + number), TRIALS[number]
                    )
            for result in advance_together([trainings[number] for number in there], budget):
                numbers[is_recorded] += [result.loss, result.grad_norm]
            gradients[is_recorded] += [trainings[number].adapter.gradients.clone() for number in there]
        for values in adapter_perplexities(
            bank, [(trainings[number].adapter, public) for number in (0, 3)], 10_000
        ):
            numbers[is_recorded] += values
        assert bool(bank.recorder.num_recordings) == is_recorded
    assert numbers[True] == pytest.approx(numbers[False], rel=0.03)
    for recorded, launched in zip(gradients[True], gradients[False], strict=True):
        assert (recorded - launched).norm() < 0.1 * launched.norm()


def test_a_pass_is_replayed_in_a_larger_recording_until_its_size_is_common(monkeypatch):
    """Perplexities of fewer examples come from the recording of more, and are those of launched passes."""
    from test_bank import TRIALS

    monkeypatch.setattr(recorded_passes, "_MOST_TIMES", 2)
    examples = random_examples(60, seed=9)
    bank = gpu_bank("llama", torch.bfloat16)
    adapter = bank.attach(TRIALS[1])
    adapter.weights.normal_(std=0.05)
    adapter.refresh()
    counts, found = [], []
    for number in (60, 54, 54, 54):
        found += adapter_perplexities(bank, [(adapter, examples[:number])], 10_000)[0]
        counts.append(bank.recorder.num_recordings)
    assert counts == [1, 1, 1, 2]
    bank.recorder.stop()
    launched = adapter_perplexities(bank, [(adapter, examples)], 10_000)[0]
    assert found == pytest.approx([*launched, *(3 * launched[:54])], rel=0.03)


def test_the_memory_of_training_is_what_the_plan_counts():
    from qlora.lora.bank import load_bank
    from tuning.device import this_device
    from tuning.model_size import model_size
    from tuning.plan import make_plan
    from tuning.space import load_space

    changes = [
        "trials_per_gpu=4",
        "num_samples=4",
        "search.lora_r={choice: [32]}",
        "search.epochs={choice: [9]}",
    ]
    space = load_space("search_spaces/wide.yaml", changes)
    before = torch.cuda.memory_allocated()
    bank = load_bank(space.base_model)
    one = random_examples(1, shared=100, vocabulary=40_000)[0]
    train = [replace(one, id=str(number), answer=one.answer * 6) for number in range(64)]
    plan = make_plan(space, train, train[:4], model_size(bank.model.config), this_device("cuda"))
    trials = [
        Training(
            bank, train, space.trial_settings({"lora_r": 32, "lora_dropout": 0.1, "epochs": 9, "seed": seed})
        )
        for seed in range(4)
    ]
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2 * trials[0].timetable.steps_per_epoch):
        advance_together(trials, plan.budget_tokens)
    measured = torch.cuda.max_memory_allocated() - before
    assert measured == pytest.approx(plan.peak_bytes, rel=0.1)


def test_layers_that_are_computed_again_train_the_same():
    examples, found = random_examples(64, seed=5), []
    for recomputes in (False, True):
        bank = gpu_bank("llama", torch.bfloat16)
        if recomputes:
            assert bank.recompute()
        else:  # launched as well
            bank.recorder = recorded_passes.Recorder(bank)
            bank.recorder.stop()
        settings = TrialSettings(learning_rate=1e-3, lora_r=16, lora_dropout=0.1, batch_size=64, epochs=3)
        training = Training(bank, examples, settings)
        found.append([training.advance(10_000).loss for _ in range(3)])
    assert found[1] == found[0]


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_layers_that_are_computed_again_take_half_the_memory():
    from qlora.lora.bank import load_bank

    short = random_examples(32, shared=2, vocabulary=40_000)
    examples = [replace(one, prompt=one.prompt * 12) for one in short]
    settings = TrialSettings(learning_rate=1e-3, lora_r=16, lora_dropout=0.1, batch_size=16, epochs=3)
    found = []
    for recomputes in (False, True):
        bank = load_bank(BaseModelSettings())
        if recomputes:
            assert bank.recompute()
        else:  # launched as well
            bank.recorder = recorded_passes.Recorder(bank)
            bank.recorder.stop()
        training = Training(bank, examples, settings)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with deterministic():  # else attention's sums have no order
            losses = [training.advance(10_000).loss for _ in range(3)]
        found.append((losses, torch.cuda.max_memory_allocated() - before))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    assert found[1][1] < 0.5 * found[0][1]


def test_large_steps_are_launched_and_leave_no_memory_to_recordings(monkeypatch):
    """A step's small remainder is not recorded beside its large passes; a trial that stays behind is recorded
    again.
    """
    from test_bank import TRIALS

    bank = gpu_bank("llama", torch.bfloat16)
    monkeypatch.setattr(recorded_passes, "_LAUNCH_BOUND", 400 * bank.mean_parameters)
    trainings = [
        Training(bank, random_examples(10, seed=number, shared=10 + number), TRIALS[number])
        for number in range(4)
    ]
    sizes = []
    for there in (1, 4, 4, 1):
        advance_together(trainings[:there], 1000)
        sizes.append(bank.recorder.num_recordings)
    assert sizes == [1, 0, 0, 1]


def test_a_pass_that_cannot_be_recorded_is_launched():
    """Float32 has no FlashAttention: that size is refused, and results are those of a bank without a
    recorder.
    """
    from test_bank import TRIALS

    losses = []
    for is_recorded in (False, True):
        bank = gpu_bank("llama")
        bank.recorder = recorded_passes.Recorder(bank)
        if not is_recorded:
            bank.recorder.stop()
        training = Training(bank, random_examples(10), TRIALS[0])
        losses.append([training.advance(10_000).loss for _ in range(3)])
        assert bank.recorder.num_recordings == 0
    assert losses[0] == losses[1]


@pytest.mark.parametrize("count", [7, 16 * 2**20, 40 * 2**20 + 3])
def test_a_large_tensor_comes_to_the_host_in_pieces(count):
    tensor = torch.arange(count, dtype=torch.int32, device=CUDA)
    found = to_host(tensor)
    tensor.zero_()
    assert not found.is_pinned() and torch.equal(found, torch.arange(count, dtype=torch.int32))


def test_an_average_is_on_the_device_in_what_is_multiplied_with_alone():
    bank = gpu_bank("llama", torch.bfloat16)
    layer = "model.layers.0.self_attn.q_proj"
    adapter = attach_update(bank, {layer: (torch.ones(2, 64), torch.full((64, 2), 3.0))})
    assert (adapter.weights.device.type, adapter.served.device.type) == ("cpu", "cuda")
    assert torch.equal(adapter.served.float().cpu(), adapter.weights)
    assert adapter.weights.sum() == 2 * 64 + 3 * 2 * 64


def gpu_bank(family, dtype=torch.float32):
    base = tiny_model(family).to(CUDA, dtype)
    use_packed_attention(base)
    return AdapterBank(base, "tiny")


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_training_is_as_exact_as_padded_rows(family):
    """In bfloat16 the packed stream is no further from float32 than padded rows are, up to the noise of
    rounding.
    """
    examples = random_examples(6, shared=24)
    exact, padded, base = (
        with_lora(tiny_model(family)),
        with_lora(tiny_model(family)).to(CUDA),
        tiny_model(family),
    )
    use_packed_attention(base)
    packed = with_lora(base).to(CUDA)
    padded_loss(exact, examples).backward()
    with torch.autocast("cuda", torch.bfloat16):
        padded_loss(padded, examples).backward()
        answer_nll(packed, pack(examples, CUDA)).mean().backward()
    errors = {
        name: (gradients(model).cpu() - gradients(exact)).norm()
        for name, model in {"padded": padded, "packed": packed}.items()
    }
    assert errors["packed"] < 1.5 * errors["padded"], errors


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 5, "length_penalty": 0.3},
        {"num_beams": 3, "early_stopping": True, "min_new_tokens": 4},
    ],
)
def test_tokens_equal_those_of_generate(family, settings):
    model, decoding = model_that_ends(family).to(CUDA), DecodingSettings(max_new_tokens=20, **settings)
    expected = [generated(model, text, decoding) for text in prompts()]
    assert searched(model, prompts(), decoding, max_slots=3) == expected


def test_texts_between_recorded_passes_are_those_of_plain_peft(tmp_path):
    """Decode steps are recorded while training's recordings exist; training goes on as without texts."""
    from test_bank import TRIALS

    examples, asked = random_examples(8, vocabulary=250), [one.prompt for one in random_examples(5, seed=3)]
    decoding, found = DecodingSettings(num_beams=1, max_new_tokens=12), []
    kinds = [one.model_copy(update={"lora_dropout": 0.0, "epochs": 3}) for one in TRIALS[:2]]
    for writes in (True, False):
        bank = gpu_bank("llama")
        generator = BankedGenerator(bank, byte_tokenizer(), decoding)
        runs, texts = [Training(bank, examples, settings) for settings in kinds], []
        for step in range(6):
            advance_together(runs, 10_000)
            if writes and step in (2, 5):
                texts = generator.texts(
                    [Asked(None, asked[:3]), *(Asked(run.adapter, asked) for run in runs)]
                )
        found.append((runs, texts))
    (runs, texts), (undisturbed, _) = found
    for number, (run, other) in enumerate(zip(runs, undisturbed, strict=True)):
        assert torch.equal(run.adapter.weights, other.adapter.weights)
        run.bank.save(run.adapter, tmp_path / str(number))
    assert [len(of_folder) for of_folder in texts] == [3, 5, 5]
    for folder, of_folder in zip((None, "0", "1"), texts, strict=True):
        plain = tiny_model("llama")
        if folder is not None:
            plain = PeftModel.from_pretrained(plain, str(tmp_path / folder))
        plain = plain.to(CUDA).eval()
        for prompt, text in zip(asked, of_folder, strict=False):
            ids = torch.tensor([prompt], device=CUDA)
            out = plain.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
            assert byte_tokenizer().decode(out[0, len(prompt) :], skip_special_tokens=True).strip() == text
