"""The time that a step is planned to take is what was measured on cards, within a fifth."""

import pytest
from transformers import LlamaConfig

from benchmarks.models import SHAPES
from tuning.device import Device
from tuning.model_size import ModelSize, model_size
from tuning.plan_time import step_seconds

# Steps of 16 course examples: their tokens, those of the packed stream, the share that is answers.
TOKENS, STREAM_TOKENS, ANSWERS = 3660, 2235, 0.25
# Operations and bytes a second that such cards were seen to have in products and copies.
CARDS = {
    name: Device("cuda", 1 << 37, speed, has_bfloat16=True, bandwidth=bandwidth, fuses_mlp=True)
    for name, speed, bandwidth in (("H100", 6.8e14, 2.6e12), ("H200", 7.8e14, 4.3e12))
}
# Trials together, tokens a second that they had, and how (docs/results.md, benchmarks/LOG.md).
MEASURED = [
    ("H100", "7b", 1, 22772, {"pass_tokens": 10240}),
    ("H100", "7b", 4, 26579, {"pass_tokens": 10240}),
    ("H100", "1b", 1, 79730, {"pass_tokens": 20480}),
    ("H100", "1b", 8, 114521, {"pass_tokens": 20480}),
    ("H100", "7b", 1, 15049, {"pass_tokens": 2170, "keeps_nf4": True}),
    ("H100", "7b", 2, 18894, {"pass_tokens": 2170, "keeps_nf4": True}),
    ("H200", "7b", 1, 24033, {"pass_tokens": 10240}),
    ("H200", "7b", 4, 29110, {"pass_tokens": 10240}),
    ("H200", "1b", 1, 90081, {"pass_tokens": 20480}),
    ("H200", "1b", 8, 122895, {"pass_tokens": 20480}),
    ("H200", "70b", 1, 1843, {"pass_tokens": 4096, "keeps_nf4": True, "recomputes": True}),
]


def size_of(shape: str) -> ModelSize:
    return model_size(LlamaConfig(vocab_size=32000, **SHAPES[shape]))


def planned(size: ModelSize, card: Device, trials: int, options: dict) -> float:
    step, trial = step_seconds(size, card, ANSWERS, step_tokens=STREAM_TOKENS, **options)
    return step + trials * trial


@pytest.mark.parametrize(("card", "shape", "trials", "tokens_per_second", "options"), MEASURED)
def test_a_step_is_planned_as_it_was_measured(card, shape, trials, tokens_per_second, options):
    measured = trials * TOKENS / tokens_per_second
    assert planned(size_of(shape), CARDS[card], trials, options) == pytest.approx(measured, rel=0.2)


def test_a_base_in_nf4_takes_longer_the_more_passes_a_step_has():
    """And the more often its layers are computed; on a CPU such a base is not told apart."""
    size, card = size_of("7b"), CARDS["H100"]

    def extra(pass_tokens: int, **options: bool) -> float:
        dense, kept = (
            planned(size, card, 1, {"pass_tokens": pass_tokens, "keeps_nf4": nf4, **options})
            for nf4 in (False, True)
        )
        return kept - dense

    assert 0 < extra(8192) < extra(2048) < extra(512)
    assert extra(2048, recomputes=True) == pytest.approx(1.5 * extra(2048))
    processor = Device("cpu", 1 << 36, 1e12)
    options = {"pass_tokens": 1152}
    assert planned(size, processor, 1, {**options, "keeps_nf4": True}) == planned(size, processor, 1, options)
