"""GGUF files: read back by transformers they are what PEFT gives, in every family, with the same tokens."""

import json
import math

import gguf
import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from export_parts import EXTENDED, QWEN_SPLIT, ROWS, byte_level, sentence_piece, write_adapter, write_base
from test_chat import TEMPLATES
from test_export import exported, logits, oracle, result
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from workflows.export.gguf_family import FAMILIES, add_settings, rope_factors, stored
from workflows.export.gguf_vocabulary import read_vocabulary
from workflows.export.ollama import template_of_text, template_of_turns, turn_texts

TOKENIZERS = {
    "llama": byte_level,
    "llama3": byte_level,
    "qwen2": lambda: byte_level(QWEN_SPLIT),
    "qwen3": lambda: byte_level(QWEN_SPLIT),
    "mistral": sentence_piece,
    "gemma3": byte_level,
}


def read_back(output, base, family):
    """Load a file as transformers does, given what it does not read."""
    own, config = AutoConfig.from_pretrained(base), AutoConfig.from_pretrained(output, gguf_file="model.gguf")
    for key in FAMILIES[own.model_type].unread:
        if hasattr(own, key):
            setattr(config, key, getattr(own, key))
    return AutoModelForCausalLM.from_pretrained(
        output, gguf_file="model.gguf", config=config, dtype=torch.float32
    )


SAMPLE = ("llama", "gemma3")  # the others are slow


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=[] if one in SAMPLE else pytest.mark.slow) for one in TOKENIZERS]
)
def test_a_file_is_what_peft_gives(family, monkeypatch, capsys, write_rows, tmp_path):
    base = write_base(family, tmp_path / "base", TOKENIZERS[family]())
    adapter = write_adapter(base, tmp_path / "adapter")
    output = tmp_path / "out"
    options = ("--format", "gguf", "--data", write_rows(ROWS))
    assert exported(monkeypatch, adapter, output, *options) == 0, capsys.readouterr().err
    found, wanted = read_back(output, base, family), oracle(base, adapter, dtype=torch.float16)
    # A weight between two numbers of float16 may be rounded to either.
    torch.testing.assert_close(logits(found), logits(wanted), rtol=2e-3, atol=1e-2)
    assert "gives the champion's tokens for all 8 examples" in result(output)["notes"][0]
    fields = gguf.GGUFReader(output / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True, "a plain prompt begins with BOS"
    written = (output / "Modelfile").read_text(encoding="utf-8")
    assert written.startswith('FROM ./model.gguf\nTEMPLATE """你是人工智慧助理')
    assert 'USER: {{ .Prompt }} ASSISTANT:"""\nPARAMETER stop "</s>"\n' in written


def test_a_tokenizer_that_transformers_cannot_read_is_told(monkeypatch, write_rows, tmp_path):
    load = AutoTokenizer.from_pretrained

    def load_no_gguf(*where, **options):
        if "gguf_file" in options:
            raise TypeError("must be real number, not NoneType")
        return load(*where, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load_no_gguf)
    base = write_base("llama", tmp_path / "base", byte_level())
    options = ("--format", "gguf", "--data", write_rows(ROWS))
    adapter = write_adapter(base, tmp_path / "adapter")
    assert exported(monkeypatch, adapter, tmp_path / "out", *options) == 0
    found = result(tmp_path / "out")
    assert found["notes"] == [
        "transformers can't read its tokenizer; it was scored with the champion's tokens"
    ]
    assert abs(found["figures"]["difference"]) < 0.01


def test_matrices_of_q8_0_are_within_half_a_step(monkeypatch, capsys, write_rows, tmp_path):
    base = write_base("llama", tmp_path / "base", byte_level())
    adapter = write_adapter(base, tmp_path / "adapter", std=0.02)
    output = tmp_path / "out"
    options = ("--format", "gguf", "--gguf-type", "q8_0", "--data", write_rows(ROWS))
    assert exported(monkeypatch, adapter, output, *options) == 0, capsys.readouterr().err
    found = read_back(output, base, "llama").state_dict()
    for name, value in oracle(base, adapter).state_dict().items():
        if value.dim() == 1:
            torch.testing.assert_close(found[name], value)
            continue
        step = value.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
        off = (found[name] - value).unflatten(-1, (-1, 32)).abs()
        assert (off <= step * 0.51 + 1e-4).all(), name


def test_llama_3_slows_frequencies_as_llama_cpp_writes_it_down():
    """The published rule: short wavelengths stay, long ones are slowed, and those between are mixed."""
    config = EXTENDED["llama3"]
    rope, width = config.rope_parameters, 16
    for found, place in zip(rope_factors(config).tolist(), range(0, width, 2), strict=True):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (place / width)
        low, high = (64 / rope[f"{one}_freq_factor"] for one in ("low", "high"))
        if wavelength < high:
            factor = 1.0
        elif wavelength > low:
            factor = 8.0
        else:
            smooth = (64 / wavelength - 1) / (4 - 1)
            factor = 1 / ((1 - smooth) / 8 + smooth)
        assert found == pytest.approx(factor, rel=1e-4)
    assert rope_factors(EXTENDED["llama"]) is None


@pytest.mark.parametrize(
    ("kind", "keys"), [("linear", {"factor"}), ("yarn", {"factor", "original_context_length"})]
)
def test_scalings_of_positions_are_written_down(kind, keys, tmp_path):
    content = EXTENDED["qwen2"].to_dict()
    content["rope_parameters"] = {
        "rope_type": kind,
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    config = type(EXTENDED["qwen2"])(**content)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    add_settings(writer, config, FAMILIES["qwen2"])
    writer.add_tensor("x", np.zeros(32, dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    scaling = {key.rpartition(".")[2]: one.contents() for key, one in fields.items() if ".scaling." in key}
    assert set(scaling) == keys | {"type"}
    assert (scaling["type"], scaling["factor"]) == (kind, 4.0)


def test_rows_of_a_head_become_pairs_of_neighbours():
    """As llama.cpp rotates: row i of the first half stands beside row i of the second."""
    config, family = EXTENDED["llama"], FAMILIES["llama"]
    rows = torch.arange(64.0)[:, None].expand(64, 3)
    found = stored(config, family, "model.layers.0.self_attn.q_proj.weight", rows)
    assert found[:6, 0].tolist() == [0, 8, 1, 9, 2, 10]
    assert torch.equal(stored(config, family, "model.layers.0.self_attn.v_proj.weight", rows), rows)


def test_a_vocabulary_has_a_token_a_row():
    tokenizer = byte_level()
    found = read_vocabulary(tokenizer, "base", 300)
    assert len(found.tokens) == len(found.types) == 300
    assert found.tokens[:5] == ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    assert [kind.name for kind in found.types[:6]] == ["CONTROL"] * 5 + ["NORMAL"]
    assert (found.tokens[299], found.types[299].name) == ("[PAD299]", "UNUSED")
    assert len(read_vocabulary(tokenizer, "base", 100).tokens) == 100
    with pytest.raises(ValueError, match="BPE without merges"):
        read_vocabulary(byte_tokenizer(), "base", 300)


TALKS = [
    [("user", "Hello {{ x }}")],
    [("user", "a"), ("assistant", "b"), ("user", "c")],
    [("system", "s"), ("user", "a")],
    [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")],
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_of_ollama_are_those_of_the_chat_template(name):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[name][0].replace("[[", "").replace("]]", "")
    texts = turn_texts(tokenizer, None)
    assert texts is not None
    for talk in TALKS:
        if talk[0][0] == "system" and texts.system is None:
            continue
        messages = [{"role": role, "content": content} for role, content in talk]
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert texts.render(talk) == wanted.removeprefix("<s>")
        assert as_go(template_of_turns(texts), talk) == texts.render(talk)


def as_go(template: str, talk: list[tuple[str, str]]) -> str:
    """Carry a template out as Go does: as much of its language as is used here."""
    head, _, rest = template.partition('{{ range $i, $m := .Messages }}{{ if eq $m.Role "system" }}')
    system, _, rest = rest.partition('{{ else if eq $m.Role "user" }}')
    user, _, rest = rest.partition("{{ else }}")
    answer, _, tail = rest.partition("{{ end }}{{ end }}")
    text = head
    for place, (role, content) in enumerate(talk):
        part = {"system": system, "user": user, "assistant": answer}[role]
        first, is_conditional, behind = part.partition("{{ end }}")
        if is_conditional:
            part = (first.removeprefix("{{ if eq $i 0 }}") if place == 0 else "") + behind
        text += part.replace("{{ $m.Content }}", content)
    return text + tail


def test_a_template_that_changes_what_is_said_has_no_go_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    assert turn_texts(tokenizer, None) is None


def test_braces_of_a_prompt_stay_braces():
    assert template_of_text("a {{ b ", " c") == 'a {{ "{{" }} b {{ .Prompt }} c'


def test_a_chat_version_has_its_turns_in_the_modelfile(monkeypatch, write_rows, tmp_path):
    from export_parts import CHATS

    base = write_base("llama", tmp_path / "base", byte_level())
    adapter = write_adapter(base, tmp_path / "adapter")
    output = tmp_path / "out"
    assert exported(monkeypatch, adapter, output, "--format", "gguf", "--data", write_rows(CHATS)) == 0
    written = (output / "Modelfile").read_text(encoding="utf-8")
    assert "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n{{ end }}{{ $m.Content }}" in written
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\n' in written
    fields = gguf.GGUFReader(output / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False, "this template writes no BOS"
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 4
    assert json.loads((output / "export.json").read_text())["settings"]["prompt"] == "chat"
