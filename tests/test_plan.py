"""The plan counts what is there, finds room for trials, and refuses what can't fit before anything starts."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, command, finished, random_examples, tiny_model
from test_training import tiny_bank
from transformers import LlamaConfig, LlamaForCausalLM

from inference.room import TextsMemory
from qlora.config import InputError, TrialSettings
from qlora.lora.bank import AdapterBank
from qlora.packed.attention import use_packed_attention
from qlora.training import Training
from tuning.device import Device, this_device
from tuning.known_devices import KNOWN, known_device
from tuning.model_size import model_size
from tuning.plan import make_plan
from tuning.plan_text import compare_with_run, describe_plan, describe_range
from tuning.space import Space
from tuning.sweep_plan import SweepPlan, make_sweep_plan

TRAIN, PUBLIC = random_examples(12), random_examples(5, seed=3)
SHAPES = {"train": "instruction + output + input", "public": "instruction + output, not used: source"}


def space(**changes) -> Space:
    return Space.model_validate(
        {
            "data": {"train": "t", "public": "p"},
            "trial": {"batch_size": 4},
            "search": {"lora_r": {"choice": [4, 16]}},
            "num_samples": 8,
            **changes,
        }
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_a_models_parameters_are_counted(family):
    model, size = tiny_model(family), model_size(CONFIGS[family])
    assert size.linear + size.other == sum(p.numel() for p in model.parameters())
    adapter = tiny_bank(family).attach(TrialSettings(lora_r=4))
    assert size.adapter_parameters(TrialSettings(lora_r=4)) == sum(
        m.numel() for m in adapter.matrices().values()
    )
    targets = TrialSettings(lora_r=4, target_modules=("q_proj",))
    assert size.adapter_parameters(targets) == sum(
        m.numel() for m in tiny_bank(family).attach(targets).matrices().values()
    )


def test_what_a_pass_keeps_is_counted():
    config = LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    bank = AdapterBank(LlamaForCausalLM(config).requires_grad_(False).eval(), "tiny")
    use_packed_attention(bank.model)
    one = random_examples(1, shared=20)[0]
    examples = [replace(one, id=str(number)) for number in range(16)]
    training = Training(bank, examples, TrialSettings(lora_r=16, batch_size=16, epochs=1))
    own = {tensor.untyped_storage().data_ptr() for tensor in bank.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        training.advance(10_000)
    planned = make_plan(
        space(search={"lora_r": {"choice": [16]}}, trial={"batch_size": 16}, num_samples=1),
        examples, PUBLIC, model_size(config), Device("cpu", 8 << 30, 1e11),
    ).activation_bytes  # fmt: skip
    beside = planned / (config.num_hidden_layers + 1)  # one layer's gradients, which nobody keeps
    assert 0.9 < sum(kept.values()) / (planned - beside) < 1.1


def test_recordings_of_rounded_sizes_are_counted_and_so_is_what_liger_saves():
    size, card = model_size(CONFIGS["llama"]), Device("cuda", 80 << 30, 1e14, has_bfloat16=True)
    launched = replace(size, linear=size.linear * 2 * 10**6)
    fused = replace(card, fuses_mlp=True)
    needed = [
        make_plan(space(), TRAIN, PUBLIC, size_, device).activation_bytes
        for size_, device in ((size, card), (launched, card), (launched, fused))
    ]
    assert needed[0] > needed[1] > needed[2]


def test_texts_are_counted_where_they_take_more_than_training():
    size, card = model_size(CONFIGS["llama"]), Device("cuda", 80 << 30, 1e14, has_bfloat16=True)
    few, many = (
        TextsMemory(count, 40, 64, size.vocabulary, size.cache_width, size.hidden) for count in (1, 100_000)
    )
    plain, small, large = (
        make_sweep_plan(space(trials_per_gpu=2), TRAIN, PUBLIC, size, [card], 1, texts)
        for texts in (None, few, many)
    )
    assert plain.peak_bytes == small.peak_bytes < large.peak_bytes < card.free_bytes
    words = describe_plan(space(objective="chrf"), TRAIN, PUBLIC, SHAPES, large, 1)
    assert re.search(r"activations \S+ GiB or, in turn with them, texts \S+ GiB; at most", words)
    assert "texts" not in describe_plan(space(), TRAIN, PUBLIC, SHAPES, plain, 1)


def test_more_memory_means_more_trials_up_to_a_limit():
    size = model_size(CONFIGS["llama"])
    auto = space(trials_per_gpu="auto")
    plenty = make_plan(auto, TRAIN, PUBLIC, size, Device("cuda", 80 << 30, 1e14))
    assert plenty.trials == 8
    tight = plenty.base_bytes + 3 * plenty.adapter_bytes + plenty.activation_bytes // 4
    plan = make_plan(auto, TRAIN, PUBLIC, size, Device("cuda", (2 << 30) + tight, 1e14))
    assert 1 <= plan.trials < 8
    assert plan.peak_bytes < plan.most_bytes <= tight
    assert make_plan(space(trials_per_gpu=3), TRAIN, PUBLIC, size, Device("cuda", 80 << 30, 1e14)).trials == 3


def test_the_fullest_moment_is_planned_for_not_the_middling_one():
    """Count on one large trial among those that follow each other; side by side, small ones are beside it."""
    size, card = model_size(CONFIGS["llama"]), Device("cuda", 80 << 30, 1e14)
    ranks = {"lora_r": {"choice": [16, 32, 64, 128]}}

    def share(trials: int, **changes) -> float:
        plan = make_plan(space(trials_per_gpu=trials, **changes), TRAIN, PUBLIC, size, card)
        mean = plan.fullest_adapters_bytes / trials
        assert 0.98 * plan.mean_adapter_bytes < mean <= plan.adapter_bytes, "drawn, but for that"
        return plan.fullest_adapters_bytes / (trials * plan.adapter_bytes)

    shares = [share(trials, search=ranks, num_samples=8) for trials in (1, 2, 8)]
    assert shares[0] > 0.9 > shares[1] > shares[2] > 60 / 128 - 0.05
    assert share(1, search=ranks, num_samples=1) < 0.6
    assert share(2, search={"lora_r": {"grid_search": [16, 64]}}, num_samples=1) == 40 / 64
    grid = {"lora_r": {"grid_search": [8, 64]}, "target_modules": {"grid_search": ["all-linear", ["q_proj"]]}}
    rates = {"learning_rate": {"grid_search": [1e-4, 2e-4, 3e-4, 4e-4]}}
    assert share(1, search=grid, num_samples=1) == 1.0
    assert share(4, search={**rates, "lora_r": {"grid_search": [16, 64]}}, num_samples=1) == 1.0
    assert share(2000, search=ranks, num_samples=2000) < 0.5
    assert share(2, search={"lora_r": {"choice": [16]}}, num_samples=4) == 1.0
    assert share(2, search=ranks, num_samples=100_000) == 1.0


def test_where_memory_is_too_short_layers_are_computed_again_and_only_there():
    size, chosen = model_size(LlamaConfig()), space(search={"lora_r": {"choice": [16]}}, num_samples=2)
    long = [replace(one, answer=one.answer * 150) for one in random_examples(8, seed=2)]

    def planned(gib: float) -> SweepPlan:
        card = Device("cuda", int(gib * 2**30), 1e14, has_bfloat16=True, bandwidth=1e12)
        return make_sweep_plan(chosen, long, PUBLIC, size, [card], 1)

    plenty, short = planned(70), planned(16)
    assert not plenty.recomputing and short.recomputing == {""}
    assert short.peak_bytes < 14 * 2**30
    words = [describe_plan(chosen, long, PUBLIC, SHAPES, plan) for plan in (plenty, short)]
    assert ["computed again" in one for one in words] == [False, True]
    with pytest.raises(InputError, match="choose a smaller base or lora_r"):
        planned(8)


def test_what_cannot_fit_is_one_clear_line():
    with pytest.raises(
        InputError, match=r"base_model: a trial needs .* GiB on a device .* are free; choose a smaller base"
    ):
        make_plan(space(), TRAIN, PUBLIC, model_size(CONFIGS["llama"]), Device("cpu", 1 << 20, 1e10))


def test_trials_and_settings_that_the_device_lacks_room_for_are_named():
    size, device = (
        model_size(CONFIGS["llama"]),
        Device("cuda", (2 << 30) + (2 << 20), 1e14, has_bfloat16=True),
    )
    with pytest.raises(InputError, match="trials_per_gpu: 64 trials need"):
        make_plan(space(trials_per_gpu=64, num_samples=64), TRAIN, PUBLIC, size, device)
    with pytest.raises(InputError, match="target_modules: no linear layer is called query"):
        make_plan(space(trial={"target_modules": ["query"]}), TRAIN, PUBLIC, size, device)
    with pytest.raises(InputError, match="lora_r: 512 is more than"):
        make_plan(
            space(search={"lora_r": {"choice": [512]}}), TRAIN, PUBLIC, size, Device("cuda", 80 << 30, 1e14)
        )


def test_no_gpu_idles_while_another_is_crowded():
    chosen, size, device = (
        space(trials_per_gpu="auto"),
        model_size(CONFIGS["llama"]),
        Device("cuda", 80 << 30, 1e14),
    )
    assert [make_plan(chosen, TRAIN, PUBLIC, size, device, count).trials for count in (1, 2, 3, 16)] == [
        8,
        4,
        3,
        1,
    ]


def test_rungs_that_no_trial_comes_to_are_told():
    size, card = model_size(CONFIGS["llama"]), Device("cuda", 80 << 30, 1e14)

    def words(rung: int, epochs: list, **more) -> str:
        asha = {"type": "asha", "time_attr": "step", "grace_period": rung, "max_t": 100}
        search = {"lora_r": {"choice": [4]}, "epochs": {"choice": epochs}, **more}
        fixed = {} if "batch_size" in more else {"batch_size": 4}
        chosen = space(scheduler=asha, search=search, trial=fixed)
        plan = make_sweep_plan(chosen, TRAIN, PUBLIC, size, [card], 1)
        return describe_plan(chosen, TRAIN, PUBLIC, SHAPES, plan)

    assert "; no trial has more than 6 steps, so that none is compared" in words(7, [1, 2])
    assert "so that none" not in words(6, [1, 2]) + words(7, [1, "2+1"])
    assert "so that none" not in words(7, [1, 2], batch_size={"choice": [1, 4]})
    assert "no trial has more than 4 steps" in words(7, [1, 2], train_examples={"choice": [5, 8]})


def test_trials_ask_for_their_share_of_a_gpu():
    size, device = model_size(CONFIGS["llama"]), Device("cuda", 80 << 30, 1e14)
    for value, share in ((3, 0.3333), (1, 1.0), ("auto", 0.125)):
        chosen = space(trials_per_gpu=value)
        shares = chosen.trial_shares(make_plan(chosen, TRAIN, PUBLIC, size, device).trials)
        assert shares == {"CPU": 1, "GPU": share}
    assert space().trial_shares() == {"CPU": 1, "GPU": 0}


def test_a_plan_in_words():
    chosen, size = space(trials_per_gpu="auto"), model_size(CONFIGS["llama"])
    plan = make_sweep_plan(chosen, TRAIN, PUBLIC, size, [Device("cuda", 80 << 30, 1e14)], 1)
    words = describe_plan(chosen, TRAIN, PUBLIC, SHAPES, plan)
    assert "(instruction + output + input)" in words and "not used: source" in words
    assert "8 trials side by side" in words and "on one device" in words
    assert plan.seconds < plan.seconds_without_stopping
    on_two = make_sweep_plan(chosen, TRAIN, PUBLIC, size, [Device("cuda", 80 << 30, 1e14)], 2)
    assert on_two.seconds < plan.seconds and "on 2 devices" in describe_plan(
        chosen, TRAIN, PUBLIC, SHAPES, on_two
    )
    fifo = space(scheduler={"type": "fifo"})
    unstopped = make_sweep_plan(fifo, TRAIN, PUBLIC, size, [Device("cuda", 80 << 30, 1e9)], 1)
    assert unstopped.seconds == pytest.approx(unstopped.seconds_without_stopping)
    assert "planned, 3.0 GiB measured" in compare_with_run(plan, 3.0, 100)
    assert "no GPU here" in describe_plan(chosen, TRAIN, PUBLIC, SHAPES, None)


def test_cut_examples_are_counted_in_the_plan():
    cut = [replace(example, is_cut=number < 2) for number, example in enumerate(TRAIN)]
    words = describe_plan(space(max_length=64), cut, PUBLIC, SHAPES, None)
    longest = max(example.num_tokens for example in cut[:2])
    train, public = (line for line in words.splitlines() if line.startswith(("train", "public")))
    assert train.endswith(f"on average, 2 cut at {longest} tokens") and "cut" not in public


def test_this_device_is_looked_at():
    device = this_device("cpu")
    assert device.kind == "cpu"
    assert device.free_bytes > 1 << 20
    assert 1e8 < device.speed < 1e15


def test_a_card_that_one_does_not_have_is_planned_for_as_a_range():
    chosen, size = space(trials_per_gpu="auto"), model_size(CONFIGS["llama"])
    slow, quick, count = known_device("a100-80g:2")
    assert (slow.name, slow.kind, count) == ("A100-80G", "cuda", 2) and slow.speed < quick.speed
    plans = [make_sweep_plan(chosen, TRAIN, PUBLIC, size, [device], count) for device in (quick, slow)]
    words = describe_range(chosen, TRAIN, PUBLIC, SHAPES, plans[0], plans[1], 3.6)
    assert re.search(
        r"time        \d+ s to \d+ s on 2 x A100-80G, going by its data sheet; up to \d+ s", words
    )
    money = re.search(r"money       ([\d.]+) to ([\d.]+) at 3.6 a card and hour; up to ([\d.]+) if", words)
    assert money and float(money[1]) == pytest.approx(plans[0].seconds * 2 * 3.6 / 3600, abs=0.005)
    assert float(money[1]) < float(money[2]) <= float(money[3])
    unmeasured = "card        no A100-80G was measured; what follows holds if it is like H100 and H200"
    assert unmeasured in words
    measured = make_sweep_plan(chosen, TRAIN, PUBLIC, size, [known_device("H100")[0]], 1)
    assert "measured" not in describe_range(chosen, TRAIN, PUBLIC, SHAPES, measured, measured)
    for unknown in ("GTX1080", "H100:0", "H100:", "H100:x", ":2"):
        with pytest.raises(InputError, match="is no known card; give one of H200, H100"):
            known_device(unknown)


@pytest.mark.parametrize("card", KNOWN)
def test_a_7b_model_is_planned_for_every_known_card_from_its_config_alone(card):
    config = LlamaConfig()  # whose defaults are Llama 2's of 7 billion parameters
    slow, quick, _ = known_device(card)
    chosen = space(trials_per_gpu="auto", search={"lora_r": {"choice": [64]}})
    plans = [
        make_sweep_plan(chosen, TRAIN, PUBLIC, model_size(config), [device], 1) for device in (quick, slow)
    ]
    assert plans[0].peak_bytes == plans[1].peak_bytes < slow.free_bytes
    assert plans[0].seconds < plans[1].seconds


def test_a_base_without_weights_can_be_planned_for_and_no_more(project, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    dry = (
        "--space",
        "space.yaml",
        "--set",
        f"base_model.name={tmp_path}/base",
        "--set",
        "trials_per_gpu=auto",
    )
    out = finished(command(project, "tune", *dry, "--dry-run", "--on", "L4", "--price", "0.8"))
    assert re.search(r"^money       [\d.]+ to [\d.]+ at 0.8 a card and hour", out, re.M)
    assert not (project / "results").exists()
    for more in (("--dry-run",), ()):
        process = command(project, "tune", *dry, *more)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 2 and f"error: {tmp_path}/base: holds no *.safetensors" in out
