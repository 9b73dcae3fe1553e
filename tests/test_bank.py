"""Many adapters on one base: each is what it would be alone, and alone it is what PEFT makes of it."""

import json

import numpy as np
import pytest
import torch
from conftest import random_examples
from oracles import loop_perplexities, peft_adapter
from peft import PeftModel
from test_training import losses, tiny_bank, tiny_model, weights

from qlora.config import InputError, TrialSettings
from qlora.lora.bank import AdapterBank, make_dropout
from qlora.lora.peft_folder import load_adapter
from qlora.lora.products import Dropout, LayerPart, add_lora, lora_backward
from qlora.packed.packing import whole_group
from qlora.perplexity import adapter_perplexities, mean_perplexity
from qlora.training import DivergedError, Training, advance_together

TRIALS = [
    TrialSettings(
        learning_rate=0.01, lora_r=4, lora_alpha=8, lora_dropout=0.1, batch_size=4, epochs=2, seed=1
    ),
    TrialSettings(
        learning_rate=0.02, lora_r=8, lora_alpha=16, lora_dropout=0.0, batch_size=4, epochs="1+1", seed=2
    ),
    TrialSettings(
        learning_rate=0.005, lora_r=2, lora_alpha=32, lora_dropout=0.3, batch_size=4, epochs=1, seed=3
    ),
    TrialSettings(
        learning_rate=0.01,
        lora_r=16,
        lora_alpha=16,
        lora_dropout=0.05,
        batch_size=5,
        epochs="1+2",
        seed=4,
        target_modules=("q_proj", "v_proj"),
    ),
]


def trial(bank: AdapterBank, number: int) -> Training:
    return Training(bank, random_examples(10, seed=number, shared=10 + number), TRIALS[number])


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
def test_a_fresh_adapter_is_the_one_that_peft_draws(targets):
    settings = TrialSettings(lora_r=4, seed=7, target_modules=targets)
    found = tiny_bank().attach(settings).matrices()
    expected = {
        name.replace(".default", ""): p
        for name, p in peft_adapter(tiny_model("llama"), settings).named_parameters()
        if "lora_" in name
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("budget", [100_000, 150])
def test_trials_together_equal_trials_alone(budget):
    """Losses, weights and perplexities of four different trials, of which two join late and each leaves when
    it is done.
    """
    public = random_examples(5, seed=9)
    alone = [trial(tiny_bank(), number) for number in range(4)]
    expected = [losses(run, run.timetable.total_steps) for run in alone]
    bank, found = tiny_bank(), [[], [], [], []]
    runs = {0: trial(bank, 0), 1: trial(bank, 1)}
    for turn in range(30):
        if turn == 2:
            runs[2] = trial(bank, 2)
        if turn == 3:
            runs[3] = trial(bank, 3)
        present = {number: run for number, run in runs.items() if not run.finished}
        if not present:
            break
        for number, result in zip(present, advance_together(list(present.values()), budget), strict=True):
            found[number].append(result.loss)
    for own, other in zip(found, expected, strict=True):
        assert own == pytest.approx(other, rel=1e-4)
    for number, run in enumerate(alone):
        # Adam makes whole steps of gradients near zero, whose rounding differs: so the weights as a whole.
        assert (weights(runs[number]) - weights(run)).norm() < 1e-4 * weights(run).norm()
    together = adapter_perplexities(bank, [(runs[number].adapter, public) for number in range(4)], budget)
    for number, run in enumerate(alone):
        assert together[number] == pytest.approx(
            adapter_perplexities(run.bank, [(run.adapter, public)], 100_000)[0], rel=1e-4
        )


def test_a_trial_does_not_depend_on_whether_others_came_before_it():
    """To the last bit: at high rates Adam makes much of what rounding does to small gradients."""
    first, later = trial(tiny_bank(), 1), tiny_bank()
    losses(trial(later, 0), 2)
    second = trial(later, 1)
    assert losses(first, 2) == losses(second, 2)
    assert torch.equal(weights(first), weights(second))


def test_a_saved_adapter_is_the_same_model_in_plain_peft(tmp_path):
    run, public = trial(tiny_bank(), 3), random_examples(5, seed=9)
    losses(run, 4)
    run.bank.save(run.adapter, tmp_path)
    plain = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path)).eval()
    ours = adapter_perplexities(run.bank, [(run.adapter, public)], 10_000)[0]
    assert mean_perplexity(ours) == pytest.approx(mean_perplexity(loop_perplexities(plain, public)), rel=1e-4)
    assert ours != pytest.approx(adapter_perplexities(run.bank, [(None, public)], 10_000)[0], rel=1e-3)


def test_one_trial_that_diverges_leaves_the_others_alone():
    bank = tiny_bank()
    broken, sound = trial(bank, 0), trial(bank, 1)
    expected = losses(trial(tiny_bank(), 1), 2)
    broken.adapter.weights.fill_(float("nan"))
    first = advance_together([broken, sound], 10_000)
    assert isinstance(first[0], DivergedError)
    assert [first[1].loss, sound.advance(10_000).loss] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("unknown", ["query", "lm_head"])
def test_an_unknown_target_is_named(unknown):
    with pytest.raises(InputError, match=rf"called {unknown}; there are: .*q_proj"):
        tiny_bank().attach(TrialSettings(target_modules=("q_proj", unknown)))


def test_layers_of_one_name_can_be_told_apart(tmp_path):
    """An adapter of some of the layers that are called alike is saved under their whole names."""
    bank, public = tiny_bank(), random_examples(3, seed=9)
    settings = TrialSettings(
        lora_r=4, batch_size=4, learning_rate=0.01, target_modules=("layers.1.self_attn.q_proj", "up_proj")
    )
    run = Training(bank, random_examples(8), settings)
    losses(run, 2)
    bank.save(run.adapter, tmp_path)
    plain = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path)).eval()
    assert sum("lora_A" in name for name, _ in plain.named_parameters()) == 3
    ours = adapter_perplexities(bank, [(run.adapter, public)], 10_000)[0]
    assert ours == pytest.approx(loop_perplexities(plain, public), rel=1e-4)


def test_products_and_gradients_are_those_of_autograd():
    """Two adapters with dropout on parts of a stream, and a part that nobody owns, against the formula
    written plainly.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, y, dy = randn(12, 6).requires_grad_(), randn(12, 5), randn(12, 5)
    parts, expected, leaves = [], y.clone(), []
    for start, end, rank, dropout in (
        (0, 5, 3, Dropout(0.4, 1, 0, (0, 1), (2, 3))),
        (8, 12, 2, Dropout(0.2, 2, 0, (0, 4), (0, 4))),
    ):
        a, b = randn(rank, 6).requires_grad_(), randn(5, rank).requires_grad_()
        parts.append(
            LayerPart(
                start, end, a.detach(), b.detach(), torch.zeros_like(a), torch.zeros_like(b), 0.7, dropout
            )
        )
        mask = dropout.kept(9, 6).double() / (1 - dropout.p)
        assert 0 < (mask == 0).sum() < mask.numel()
        expected = expected.index_add(0, torch.arange(start, end), 0.7 * (x[start:end] * mask) @ a.T @ b.T)
        leaves += [a, b]
    found, dx = y.clone(), torch.zeros(12, 6, dtype=torch.float64)
    kept = add_lora(x.detach(), found, parts, 9)
    lora_backward(x.detach(), dy, dx, parts, kept)
    torch.testing.assert_close(found, expected)
    ours = [dx, *(gradient for part in parts for gradient in (part.a_grad, part.b_grad))]
    for own, other in zip(ours, torch.autograd.grad(expected, [x, *leaves], dy), strict=True):
        torch.testing.assert_close(own, other)


def test_dropout_masks():
    """Mean and independence as theory has them; the same for an example wherever it stands, another in each
    step and layer.
    """
    settings = TrialSettings(lora_dropout=0.1, seed=5)
    examples = random_examples(6)
    adapter = tiny_bank().attach(settings)
    whole, step = whole_group(examples), 3
    kept = make_dropout(adapter, whole, step).kept(layer=2, width=2000).float()
    # 5 standard deviations of 300,000 draws
    assert kept.mean().item() == pytest.approx(0.9, abs=0.003)
    correlation = np.corrcoef(kept[:, :-1].flatten(), kept[:, 1:].flatten())[0, 1]
    assert abs(correlation) < 0.01
    last = (
        Dropout(0.1, 5, step, (0, 6), (whole.prefix_length, examples[5].num_tokens - whole.prefix_length))
        .kept(2, 2000)
        .float()
    )
    assert torch.equal(last[: whole.prefix_length], kept[: whole.prefix_length])
    assert torch.equal(last[whole.prefix_length :], kept[-(examples[5].num_tokens - whole.prefix_length) :])
    for other in (
        make_dropout(adapter, whole, step + 1).kept(2, 2000),
        make_dropout(adapter, whole, step).kept(3, 2000),
    ):
        # 0.9**2 + 0.1**2
        assert (other.float() == kept).float().mean().item() == pytest.approx(0.82, abs=0.01)
    assert make_dropout(tiny_bank().attach(TrialSettings(lora_dropout=0.0)), whole, 0) is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"r": 8}, "size mismatch"),
        ({"target_modules": ["nosuch"]}, "nosuch"),
        ({"target_modules": ["q_proj"]}, "matrices are on one side only"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(change, problem, tmp_path):
    bank = tiny_bank()
    bank.save(bank.attach(TrialSettings(lora_r=4)), tmp_path)
    assert load_adapter(tiny_model("llama"), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(InputError, match=f"doesn't fit this base: .*{problem}"):
        load_adapter(tiny_model("llama"), tmp_path)
