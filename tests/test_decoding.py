"""Settings that the beam search lacks go to `transformers.generate`, and each output is as it is alone."""

import pytest
from conftest import byte_tokenizer, tiny_model
from test_beam_engine import prompts

from inference.engine import TransformersEngine, make_engine
from qlora.config import DecodingSettings

PENALTY, NGRAM, STOP = "RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "stop texts"


def texts_of(settings: dict, asked: list) -> tuple[list[str], str]:
    """The outputs, and the engine's name."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None  # many have none, or EOS for one
    engine = make_engine(tiny_model("llama"), tokenizer, DecodingSettings(max_new_tokens=16, **settings))
    assert isinstance(engine, TransformersEngine)
    found = {index: text for index, text, _ in engine.generate(asked)}
    return [found[index] for index in range(len(asked))], engine.name


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"repetition_penalty": 1.8}, PENALTY), ({"no_repeat_ngram_size": 2}, NGRAM), ({"stop": ("a",)}, STOP)],
)
def test_an_output_does_not_depend_on_its_company(settings, reason, beams):
    settings = {**settings, "num_beams": beams}
    together, name = texts_of(settings, prompts())
    assert name.startswith("transformers.generate (asked for: ") and reason in name
    assert together == [texts_of(settings, [one])[0][0] for one in prompts()]


def test_an_output_ends_before_the_first_stop_text():
    plain, _ = texts_of({"num_beams": 1, "stop": ("\0\0\0",)}, prompts())
    text = next(one for one in plain if len(one) > 4)
    stops = (text[3], text[1:3])
    stopped, _ = texts_of({"num_beams": 1, "stop": stops}, prompts())
    assert stopped[plain.index(text)] == text[:1].strip()
    for whole, cut in zip(plain, stopped, strict=True):
        assert whole.startswith(cut) and not any(stop in cut for stop in stops)


def test_settings_of_repetition_change_what_is_said():
    plain, _ = texts_of({"num_beams": 1, "stop": ("\0\0\0",)}, prompts())
    for settings in ({"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 1}):
        assert texts_of({"num_beams": 1, **settings}, prompts())[0] != plain


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"no_repeat_ngram_size": 0}, "ngram"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_settings_out_of_range(settings, key):
    with pytest.raises(ValueError, match=key):
        DecodingSettings(**settings)
