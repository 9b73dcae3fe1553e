"""Averages of adapters: what they add to a layer is the mean of what their members add."""

import pytest
import torch
from conftest import random_examples
from oracles import loop_perplexities
from test_bank import trial
from test_training import tiny_bank, tiny_model, weights

from qlora.config import InputError
from qlora.lora.average import attach_update, mean_update, rank_of, read_update, reduced
from qlora.lora.bank import AdapterBank
from qlora.lora.peft_folder import load_adapter
from qlora.perplexity import adapter_perplexities


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two trained adapters of ranks 4 and 16; the second leaves most layers alone."""
    bank, found = tiny_bank(), []
    for number in (0, 3):
        training = trial(bank, number)
        for _ in range(4):
            training.advance(10_000)
        found.append(tmp_path_factory.mktemp("adapter"))
        bank.save(training.adapter, found[-1])
    return found


def added(update, layer: str) -> torch.Tensor:
    a, b = update[layer]
    return b @ a


def test_an_average_adds_the_mean_of_what_its_members_add(folders):
    first, second = map(read_update, folders)
    found = mean_update([first, second], [0.75, 0.25])
    assert found.keys() == first.keys() > second.keys()
    for layer in found:
        expected = 0.75 * added(first, layer)
        if layer in second:
            expected = expected + 0.25 * added(second, layer)
        torch.testing.assert_close(added(found, layer), expected)
    assert rank_of(found) == 4 + 16


def test_an_average_is_a_plain_peft_folder(folders, tmp_path):
    """PEFT, which knows nothing of averages, gives the merged weights' perplexities: here from the folder."""
    bank = tiny_bank()
    found = mean_update([read_update(folder) for folder in folders], [0.5, 0.5])
    adapter, examples = attach_update(bank, found), random_examples(6)
    ours = adapter_perplexities(bank, [(adapter, examples)], 10_000)[0]
    bank.save(adapter, tmp_path / "average")
    merged = tiny_model("llama")
    with torch.no_grad():
        for layer in found:
            merged.get_submodule(layer).weight += added(found, layer)
    assert ours == pytest.approx(loop_perplexities(merged, examples), rel=1e-4)
    in_peft = load_adapter(tiny_model("llama"), tmp_path / "average")
    assert loop_perplexities(in_peft, examples) == pytest.approx(ours, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 8, 19])
def test_a_reduced_average_is_the_nearest_of_its_rank(folders, rank):
    """Misses what a full SVD has behind the first `rank` singular values, and no more."""
    whole = mean_update([read_update(folder) for folder in folders], [0.5, 0.5])
    found = reduced(whole, rank)
    assert rank_of(found) == rank
    for layer in whole:
        values = torch.linalg.svdvals(added(whole, layer).double())
        missing = torch.linalg.matrix_norm((added(whole, layer) - added(found, layer)).double())
        expected = values[rank:].square().sum().sqrt()
        torch.testing.assert_close(missing, expected, rtol=1e-3, atol=1e-5 * values[0].item())
    short = [layer for layer in whole if len(whole[layer][0]) <= rank]
    assert all(found[layer] is whole[layer] for layer in short)


def test_members_that_are_alike_are_reduced_without_loss(folders):
    """Twice the same member has half of its directions twice: rank is lost, the sum is not."""
    one = read_update(folders[0])
    twice = reduced(mean_update([one, one], [0.5, 0.5]), 4)
    for layer in one:
        torch.testing.assert_close(added(twice, layer), added(one, layer), atol=1e-6, rtol=1e-4)


def test_a_fresh_adapter_can_be_averaged():
    """Its B is zero, so that it adds nothing, and no direction is there to be divided by."""
    bank = tiny_bank()
    fresh = trial(bank, 1).adapter.matrices()
    update = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            matrix,
            fresh[name.replace("lora_A", "lora_B")],
        )
        for name, matrix in fresh.items()
        if "lora_A" in name
    }
    found = reduced(mean_update([update, update], [0.5, 0.5]), 4)
    assert all(torch.isfinite(a).all() and torch.count_nonzero(b @ a) == 0 for a, b in found.values())


def test_an_average_is_on_the_device_in_what_is_multiplied_with_alone(folders):
    """Its float32 weights are there to be saved; that they stay in the host's memory a GPU's test shows."""
    bank = AdapterBank(tiny_model("llama").bfloat16(), "tiny")
    update = mean_update([read_update(folder) for folder in folders], [0.5, 0.5])
    adapter = attach_update(bank, update)
    assert (adapter.weights.dtype, adapter.served.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(adapter.served, adapter.weights.bfloat16())
    assert adapter.gradients is adapter.served, "it needs none"


def test_an_average_that_is_measured_changes_no_trial(folders):
    bank = tiny_bank()
    training = trial(bank, 0)
    before = weights(training)
    adapter = attach_update(bank, mean_update([read_update(folder) for folder in folders], [0.5, 0.5]))
    adapter_perplexities(bank, [(adapter, random_examples(4))], 10_000)
    assert torch.equal(weights(training), before)
    assert adapter.gradients is adapter.weights, "it needs none"


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no adapter_config"):
        read_update(tmp_path)
