"""Data files and prompts: what is read, what a prompt looks like, and which token ids the metric sees."""

import pytest
from conftest import byte_tokenizer

from qlora.data.examples import examples_digest, load_examples
from qlora.data.prompts import encode_examples, encode_prompt, load_prompt, prompt_text
from qlora.data.row_shapes import instruction_example

DEFAULT = (
    "你是人工智慧助理，以下是用戶和人工智能助理之間的對話。你要對用戶的問題提供有用、安全、詳細和禮貌的回答。"
)


@pytest.fixture
def shots(write_rows):
    return write_rows(
        [{"id": str(n), "instruction": f"問{n}{{shots}}", "output": f"答{n}"} for n in range(1, 5)],
        "train.json",
    )


def test_the_default_prompt_is_the_reports():
    assert load_prompt().render("翻譯：{x}") == f"{DEFAULT}USER: 翻譯：{{x}} ASSISTANT:"


def test_zero_shot_is_the_default():
    assert load_prompt("zero-shot").template.template == load_prompt("default").template.template


def test_few_shot_shows_the_last_examples_numbered(shots):
    text = load_prompt("few-shot", 2, shots).render("問題")
    assert text == (
        f"{DEFAULT}以下是範例:\n1. USER: 問3{{shots}} ASSISTANT: 答3\n2. USER: 問4{{shots}} ASSISTANT: 答4\n"
        "請作答:\nUSER: 問題 ASSISTANT:"
    )


def test_a_new_template_is_just_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("template: 'Q: {instruction}\nA:'", encoding="utf-8")
    assert load_prompt(str(path)).render("x") == "Q: x A:"


def test_encoding_is_bos_prompt_answer_eos():
    tokenizer = byte_tokenizer()
    [encoded] = encode_examples(tokenizer, load_prompt(), [instruction_example("a", "甲", "乙丙")], "file")
    assert encoded.prompt == (
        1,
        *tokenizer(load_prompt().render("甲"), add_special_tokens=False)["input_ids"],
    )
    assert encoded.answer == (*tokenizer("乙丙", add_special_tokens=False)["input_ids"], 2)
    assert tokenizer.decode(encoded.answer, skip_special_tokens=True) == "乙丙"


def test_no_bos_when_the_tokenizer_has_none():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    assert encode_prompt(tokenizer, "ab") == tuple(tokenizer("ab", add_special_tokens=False)["input_ids"])


def test_the_cut_falls_on_the_answer():
    tokenizer = byte_tokenizer()
    whole = encode_examples(tokenizer, load_prompt(), [instruction_example("a", "甲", "乙" * 50)], "file")[0]
    cut = encode_examples(
        tokenizer, load_prompt(), [instruction_example("a", "甲", "乙" * 50)], "file", len(whole.prompt) + 7
    )[0]
    assert cut.prompt == whole.prompt
    assert cut.answer == whole.answer[:7]


def test_digests_follow_content_not_formatting(write_rows, tmp_path):
    rows = [{"id": "a", "instruction": "x", "output": "y", "note": "ignored"}]
    path = tmp_path / "b.json"
    path.write_text('[ {"output":"y", "instruction":"x",\n"id":"a"} ]', encoding="utf-8-sig")
    digests = {examples_digest(load_examples(file, need_output=True)) for file in (write_rows(rows), path)}
    assert len(digests) == 1


@pytest.mark.parametrize(("name", "count"), [("train", 64), ("public_test", 16), ("private_test", 16)])
def test_the_sample_data_are_whole(name, count):
    examples = load_examples(f"data/sample/{name}.json", need_output=name != "private_test")
    assert len(examples) == count
    assert any("文言文" in e.instruction or "古" in e.instruction for e in examples)
    assert any("現代" in e.instruction or "白話" in e.instruction for e in examples)


@pytest.mark.slow
def test_the_embedded_base_ends_answers_where_it_ends_its_own():
    from qlora.base.model import load_config, load_tokenizer
    from qlora.config import DEFAULT_BASE

    tokenizer, config = load_tokenizer(DEFAULT_BASE), load_config(DEFAULT_BASE)
    assert (
        (tokenizer.bos_token_id, tokenizer.eos_token_id)
        == (config.bos_token_id, config.eos_token_id)
        == (1, 2)
    )
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_a_prompts_text_is_the_one_that_it_was_loaded_from(tmp_path):
    """Versions carry it, whatever becomes of the file while a sweep runs."""
    path = tmp_path / "mine.yaml"
    path.write_text('template: "one {instruction}"', encoding="utf-8")
    prompt = load_prompt(str(path))
    path.write_text('template: "two {instruction}"', encoding="utf-8")
    assert prompt_text(prompt) == 'template: "one {instruction}"'
    path.unlink()
    assert "one" in prompt_text(prompt)
