"""Training: stages, the exact loss of a split step, exact resume, and gradients that survive evaluation on
every CPU.
"""

import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import random_examples, tiny_model
from oracles import adamw_of, loop_perplexities, peft_adapter, plain_step
from safetensors.torch import load_file

import qlora.perplexity
from qlora.base.model import load_base
from qlora.base.reference import base_digest
from qlora.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from qlora.config import BaseModelSettings, InputError, TrialSettings
from qlora.lora.bank import AdapterBank
from qlora.packed.attention import use_packed_attention
from qlora.perplexity import adapter_perplexities, example_perplexities, mean_perplexity
from qlora.training import DivergedError, Training, make_timetable

SETTINGS = TrialSettings(learning_rate=0.01, lora_r=4, lora_dropout=0.1, batch_size=4, epochs="1+1", seed=3)


def training(settings=SETTINGS, count=10, bank=None):
    return Training(bank or tiny_bank(), random_examples(count), settings)


def tiny_bank(family="llama") -> AdapterBank:
    base = tiny_model(family).requires_grad_(False)
    use_packed_attention(base)
    return AdapterBank(base, "tiny")


def losses(run, count, budget=10_000) -> list[float]:
    return [run.advance(budget).loss for _ in range(count)]


def weights(run) -> torch.Tensor:
    return torch.cat([matrix.flatten() for matrix in run.adapter.matrices().values()])


def test_a_timetable_counts_short_batches_and_stages():
    timetable = make_timetable(10, TrialSettings(batch_size=4, epochs="1+1+3"))
    assert (timetable.steps_per_epoch, timetable.total_steps) == (3, 15)
    assert [timetable.stage_of(step) for step in (0, 2, 3, 6, 14)] == [(0, 0), (0, 0), (1, 3), (2, 6), (2, 6)]
    assert timetable.percent_at(15) == 100


def test_an_epoch_sees_every_example_once_and_epochs_differ_in_order():
    run = training()
    first, second = (
        [e.id for step in steps for e in run.batch_at(step)] for steps in (range(3), range(3, 6))
    )
    assert sorted(first) == sorted(second) == sorted(e.id for e in run.examples)
    assert first != second


def test_each_stage_starts_its_schedule_afresh():
    run = training()
    rates = [run.advance(10_000).learning_rate for _ in range(6)]
    assert rates == pytest.approx([0.01, 0.01 * 2 / 3, 0.01 / 3] * 2)


def test_a_stage_begins_with_a_fresh_optimizer_in_the_memory_of_the_last_one():
    """Moments are two thirds of what a trial takes of a GPU beside its base."""
    run, again = training(), training()
    losses(run, 3)
    before = {name: value.data_ptr() for name, value in run.state()[0].items()}
    assert any(value.any() for value in run.state()[0].values())
    again.adapter.weights.copy_(run.adapter.weights)
    again.adapter.refresh()
    again.begin_at(3)
    run.start_step()
    after = run.state()[0]
    assert {name: value.data_ptr() for name, value in after.items()} == before
    assert not any(value.any() for value in after.values())
    assert losses(run, 3) == losses(again, 3)


def test_a_step_equals_plain_pytorch_on_padded_rows():
    """One AdamW step against PEFT on padded rows, loss.backward, clip and step."""
    settings = SETTINGS.model_copy(update={"lora_dropout": 0.0})
    run = training(settings)
    plain = peft_adapter(tiny_model("llama").requires_grad_(False), settings)
    optimizer = adamw_of(plain)
    for step in range(2):
        rate = 0.01 * (3 - step) / 3
        loss = plain_step(plain, optimizer, run.batch_at(step), rate, settings.max_grad_norm)
        assert run.advance(10_000).loss == pytest.approx(loss, rel=1e-5)
    parameters = [p for p in plain.parameters() if p.requires_grad]
    assert torch.allclose(weights(run), torch.cat([p.detach().flatten() for p in parameters]), atol=1e-4)


def test_splitting_a_step_by_the_budget_changes_nothing():
    settings = SETTINGS.model_copy(update={"lora_dropout": 0.0})
    whole, split = training(settings), training(settings)
    for _ in range(3):
        assert whole.advance(10_000).loss == pytest.approx(split.advance(1).loss, rel=1e-5)
    assert torch.allclose(weights(whole), weights(split), atol=2e-5)


def test_splitting_a_step_changes_no_dropout_mask():
    """An example's mask, and the prefix's, is its own."""
    whole, split = training(), training()
    for _ in range(3):
        assert whole.advance(10_000).loss == pytest.approx(split.advance(1).loss, rel=1e-5)
    # Adam makes whole steps of gradients near zero, whose rounding differs: so the weights as a whole.
    assert (weights(whole) - weights(split)).norm() < 1e-4 * weights(whole).norm()


def test_a_seed_makes_training_repeatable():
    runs = [training(), training(), training(SETTINGS.model_copy(update={"seed": 4}))]
    first, again, other = (losses(run, 4) for run in runs)
    assert first == again
    assert first != other


@pytest.mark.parametrize("stop_at", [2, 3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stop_at):
    whole = training()
    expected = losses(whole, 6)
    first = training()
    losses(first, stop_at)
    save_checkpoint(tmp_path / "checkpoint", first)
    second = training()
    load_checkpoint(tmp_path / "checkpoint", second)
    adapter_perplexities(second.bank, [(second.adapter, second.examples)], 10_000)
    assert losses(second, 6 - stop_at) == expected[stop_at:]
    assert torch.equal(weights(second), weights(whole))


def test_a_finished_run_is_kept_without_its_optimizer(tmp_path):
    run, again = training(), training()
    losses(run, run.timetable.total_steps)
    save_checkpoint(tmp_path / "c", run)
    load_checkpoint(tmp_path / "c", again)
    assert again.finished
    assert torch.equal(weights(again), weights(run))
    assert load_file(tmp_path / "c" / "optimizer.safetensors") == {}


def test_an_unfinished_or_damaged_checkpoint_is_refused(tmp_path):
    run = training()
    run.advance(10_000)
    save_checkpoint(tmp_path / "c", run)
    damaged = tmp_path / "c" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        load_checkpoint(tmp_path / "c", training())
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest"):
        load_checkpoint(tmp_path / "c", training())


def test_another_runs_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path / "c", training())
    with pytest.raises(ValueError, match="other settings"):
        load_checkpoint(tmp_path / "c", training(SETTINGS.model_copy(update={"learning_rate": 0.02})))


def test_divergence_is_an_error_not_a_number():
    run = training()
    run.adapter.weights.fill_(float("nan"))
    with pytest.raises(DivergedError, match="lower learning rate"):
        run.advance(10_000)


def test_perplexity_equals_a_plain_loop_and_ignores_grouping():
    examples = random_examples(9)
    expected = loop_perplexities(tiny_model("qwen2"), examples)
    model = tiny_model("qwen2")
    use_packed_attention(model)
    for budget in (1, 150, 100_000):
        assert example_perplexities(model, examples, budget) == pytest.approx(expected, rel=1e-4)


def test_uniform_logits_give_the_vocabulary_size():
    model = tiny_model("llama")
    use_packed_attention(model)
    model.lm_head.weight.data.zero_()
    values = example_perplexities(model, random_examples(4), 10_000)
    assert values == pytest.approx([300.0] * 4, rel=1e-5)
    assert mean_perplexity(values) == pytest.approx(300.0, rel=1e-5)


def test_training_after_evaluation_keeps_its_gradients(tiny_base, monkeypatch):
    """On a CPU that has AVX512-BF16, or is taken for one: bitsandbytes must not repack the weights at the
    first evaluation.
    """
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    model = load_base(BaseModelSettings(name=str(tiny_base)), torch.device("cpu"))
    use_packed_attention(model)
    packed_weights = {
        name: module.weight.data_ptr()
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }
    assert len(packed_weights) == 14
    run = Training(AdapterBank(model, "tiny"), random_examples(4, vocabulary=250), SETTINGS)
    adapter_perplexities(run.bank, [(run.adapter, run.examples)], 10_000)
    run.advance(10_000)
    norms = [b.of(run.adapter.gradients).norm().item() for _, b in run.adapter.layers.values()]
    assert len(norms) == 14
    assert all(norm > 0 for norm in norms)


def test_a_bases_digest_is_that_of_its_files(tiny_base, tmp_path):
    """The same wherever the folder is, another for other weights; a hub model's revision stands for it."""
    copied = Path(shutil.copytree(tiny_base, tmp_path / "copied"))
    assert base_digest(str(copied)) == base_digest(str(tiny_base))
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    assert base_digest(str(copied)) != base_digest(str(tiny_base))
    assert base_digest("owner/model@5073b2bbc1aa5519acdc865e99832857ef47f7c9") is None


def test_damaged_weights_are_told_in_one_line(tiny_base, tmp_path):
    copied = Path(shutil.copytree(tiny_base, tmp_path / "copied"))
    (copied / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match="can't be loaded") as refusal:
        load_base(BaseModelSettings(name=str(copied), quantization="none"), torch.device("cpu"))
    assert "\n" not in str(refusal.value)


def test_out_of_memory_shrinks_the_passes_of_a_served_model(monkeypatch):
    """The closing proof measures so: what is scored stays scored, and the smallest pass may still fail."""
    model, examples, tried, most = tiny_model("llama"), random_examples(40, seed=3), [], 400
    use_packed_attention(model)
    expected = example_perplexities(model, examples, 10_000)
    whole = qlora.perplexity.lay_out

    def short_of_memory(groups, device):
        tried.append(sum(group.num_tokens for group in groups))
        if tried[-1] > most:
            raise torch.cuda.OutOfMemoryError("no room")
        return whole(groups, device)

    monkeypatch.setattr(qlora.perplexity, "lay_out", short_of_memory)
    assert example_perplexities(model, examples, 10_000) == pytest.approx(expected, rel=1e-4)
    assert max(tried) > most >= tried[-1]
    most = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        example_perplexities(model, examples, 10_000)
