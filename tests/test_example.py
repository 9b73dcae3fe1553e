"""The example of the learning core, run as its docstring says."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT
from oracles import loop_perplexities
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.base.model import load_tokenizer
from qlora.data.examples import load_examples
from qlora.data.prompts import encode_examples, load_prompt


def test_one_adapter_is_trained_measured_and_saved(tiny_base, write_rows, tmp_path):
    rows = [{"id": f"e{n}", "instruction": f"say {n % 3}", "output": f"it is {n % 3}"} for n in range(24)]
    train, public = write_rows(rows[:16], "train.json"), write_rows(rows[16:], "public.json")
    options = ["--base", str(tiny_base), "--train", str(train), "--public", str(public), "--out", "adapter"]
    script = ROOT / "examples/one_adapter.py"
    out = subprocess.run(
        [sys.executable, script, *options], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    before, after = map(float, re.findall(r"public perplexity (\S+) -> (\S+)", out)[0])
    assert after < before
    examples = encode_examples(
        load_tokenizer(str(tiny_base)), load_prompt(), load_examples(str(public), need_output=True), "public"
    )
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="float32",
    )
    base = AutoModelForCausalLM.from_pretrained(
        tiny_base, quantization_config=nf4, dtype="float32"
    ).dequantize()
    plain = loop_perplexities(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), examples)
    assert sum(plain) / len(plain) == pytest.approx(after, rel=1e-3)
