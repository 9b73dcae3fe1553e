"""The registered model as MLflow loads it: bounded engines, concurrent callers, prompts that fit."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pandas
import pytest
from conftest import ROOT
from test_training import tiny_bank

from inference.engine import ServedModel, load_engine
from qlora.config import BaseModelSettings, DecodingSettings, TrialSettings
from qlora.data.prompts import PROMPT_FOLDER, encode_prompt, load_prompt

ASKED = ["春", "夏天的風", "秋", "冬山"]


@pytest.fixture(scope="module")
def served_model():
    spec = importlib.util.spec_from_file_location("served_model", ROOT / "deploy/served_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_base):
    folder = tmp_path_factory.mktemp("adapter")
    bank = tiny_bank()
    adapter = bank.attach(TrialSettings(lora_r=4))
    adapter.weights.normal_(std=0.2)
    bank.base_name = str(tiny_base)
    bank.save(adapter, folder)
    return folder


@pytest.fixture
def model(served_model, adapter, tiny_base):
    found = served_model.AdapterModel()
    artifacts = {"adapter": str(adapter), "prompt": str(PROMPT_FOLDER / "default.yaml")}
    config = {"base_model": str(tiny_base), "quantization": "none"}
    found.load_context(SimpleNamespace(model_config=config, artifacts=artifacts))
    return found


def asked(model, texts, **params) -> list[str]:
    return list(model.predict(None, pandas.DataFrame({"instruction": texts}), params)["output"])


def expected(adapter, tiny_base, **settings) -> list[str]:
    base = BaseModelSettings(name=str(tiny_base), quantization="none")
    engine = load_engine(ServedModel(base, str(adapter)), DecodingSettings(**settings))
    prompts = [encode_prompt(engine.tokenizer, load_prompt().render(text)) for text in ASKED]
    found = {index: text for index, text, _ in engine.generate(prompts)}
    return [found[index] for index in range(len(ASKED))]


def test_callers_at_once_get_what_they_would_get_alone(model, adapter, tiny_base):
    """Two settings, one of which goes to transformers' generate, which needs attention of its own."""
    search, other = (
        {"num_beams": 2, "max_new_tokens": 5},
        {"num_beams": 2, "max_new_tokens": 4, "do_sample": True},
    )
    want = expected(adapter, tiny_base, **search)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(asked, model, ASKED, **search) for _ in range(4)]
        sampled = [pool.submit(asked, model, ASKED, **other, seed=1) for _ in range(2)]
    assert all(one.result() == want for one in found)
    assert sampled[0].result() == sampled[1].result()


def test_engines_are_kept_in_bounds(model, served_model):
    for length in range(1, 2 * served_model._MOST_ENGINES):
        asked(model, ASKED[:1], max_new_tokens=length, num_beams=1)
    assert len(model._engines) == served_model._MOST_ENGINES
    kept = next(iter(model._engines))
    asked(model, ASKED[:1], max_new_tokens=kept.max_new_tokens, num_beams=1)
    asked(model, ASKED[:1], max_new_tokens=20, num_beams=1)
    assert kept in model._engines, "the one that was not used for longest goes"


def test_a_prompt_that_is_too_long_is_named(model):
    with pytest.raises(ValueError, match=r"row 1: the prompt has .* tokens, but the model has room for"):
        asked(model, ["春", "夏" * 2000], max_new_tokens=8)
