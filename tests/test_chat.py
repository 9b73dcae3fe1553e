"""Chat prompts equal `tokenizer.apply_chat_template`; what the assistant says is scored and nothing else.

The templates have the shapes of published ones. `[[` and `]]` stand around what is to be scored: transformers
finds it by its own `generation` marks, which published templates lack, and this project without them.
"""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from test_inputs import GOOD, evaluate, infer, nothing_heavy_happens, refused  # noqa: F401

from qlora.base.model import template_digest, tokenizer_digest
from qlora.base.reference import base_weights_digest
from qlora.config import BaseModelSettings, InputError
from qlora.data.chat import ChatPrompt, ChatSettings
from qlora.data.prompts import check_chat, encode_examples, for_chat, load_prompt, prompt_text
from qlora.data.row_shapes import Example, Turn
from qlora.packed.attention import use_packed_attention
from qlora.packed.packing import whole_group
from qlora.perplexity import example_perplexities
from tracking.registry import RegisteredAdapter
from workflows.model_choice import ModelChoice, NamedAdapter, reading_in_words

LLAMA_3 = (
    "{% for m in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}[[{{ m['content'] | trim + '<|eot_id|>' }}]]"
    "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}[[{{ m['content'] + '<|im_end|>' }}]]{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages if m['role'] == 'user' %}{% set ns.last = messages.index(m) %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}{% set said = parts[-1].lstrip('\n') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{% set opened = '<think>\n' + thought + '\n</think>\n\n' if loop.index0 > ns.last else '' %}"
    "{% if enable_thinking is defined and not enable_thinking and not thought %}{{ opened }}"
    "[[{{ said + '<|im_end|>' }}]]{% else %}[[{{ opened + said + '<|im_end|>' }}]]{% endif %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
GEMMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{% if loop.first %}{{ first }}{% endif %}"
    "{% if m['role'] == 'assistant' %}[[{{ m['content'] | trim + '<end_of_turn>' }}]]{{ '\n' }}"
    "{% else %}{{ m['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + messages[0]['content'] + '[/SYSTEM_PROMPT]' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}[[{{ m['content'] + eos_token }}]]{% endif %}{% endfor %}"
)
PHI_4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' }}"
    "{% if m['role'] == 'assistant' %}[[{{ m['content'] + '<|im_end|>' }}]]"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
TEMPLATES = {
    "llama3": (LLAMA_3, "<|eot_id|>"),
    "qwen2.5": (CHATML, "<|im_end|>"),
    "smollm2": (CHATML, "<|im_end|>"),
    "qwen3": (QWEN_3, "<|im_end|>"),
    "gemma3": (GEMMA_3, "<end_of_turn>"),
    "mistral": (MISTRAL, "</s>"),
    "phi4": (PHI_4, "<|im_end|>"),
}
MARKS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"]
MARKS += ["<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]


def tokenizer_with(template: str | None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = template and template.replace("[[", "").replace("]]", "")
    return tokenizer


def marked(template: str) -> str:
    return template.replace("[[", "{% generation %}").replace("]]", "{% endgeneration %}")


SYSTEM = Turn("system", "你是助理。")
CONVERSATIONS = {
    "one turn": Example("a", (Turn("user", "問 甲"),), "答 乙"),
    "with a system": Example("b", (SYSTEM, Turn("user", "問")), "答\n二"),
    "several turns": Example(
        "c", (SYSTEM, Turn("user", "一"), Turn("assistant", "二二"), Turn("user", "二二")), "二"
    ),
    "the same again": Example("d", (Turn("user", "同"), Turn("assistant", "同"), Turn("user", "同")), "同"),
    "words of the tags": Example(
        "g", (Turn("user", "問"), Turn("assistant", "<"), Turn("user", "再")), "think"
    ),
    "with its header as text": Example("e", (Turn("user", "assistant\n"),), "assistant\nuser"),
    "with thoughts": Example(
        "f",
        (Turn("user", "問"), Turn("assistant", "<think>\n想\n</think>\n\n答"), Turn("user", "再")),
        "<think>\n又想\n</think>\n\n終",
    ),
}


def messages_of(example: Example) -> list[dict[str, str]]:
    turns = [*example.turns, Turn("assistant", example.output or "")]
    return [{"role": turn.role, "content": turn.content} for turn in turns]


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_what_is_scored_equal_transformers(name, case, thinking):
    template, example = TEMPLATES[name][0], CONVERSATIONS[case]
    tokenizer, options = tokenizer_with(template), {} if thinking is None else {"enable_thinking": thinking}
    found = tokenizer.apply_chat_template(
        messages_of(example), chat_template=marked(template), return_assistant_tokens_mask=True, **options
    )
    scored = [place for place, is_scored in enumerate(found["assistant_masks"]) if is_scored]
    prompt = ChatPrompt("chat", ChatSettings(thinking=thinking))
    assert prompt.encode(tokenizer, example) == (list(found["input_ids"]), scored)
    last = ChatPrompt("chat", ChatSettings(thinking=thinking, loss="last")).encode(tokenizer, example)[1]
    assert last == scored[-len(last) :] and last == list(range(last[0], last[-1] + 1))
    assert (last == scored) == (sum(turn.role == "assistant" for turn in example.turns) == 0)
    asked = tokenizer.apply_chat_template(
        messages_of(example)[:-1], add_generation_prompt=True, return_dict=False, **options
    )
    assert list(prompt.ids(tokenizer, example.turns)) == asked
    if not (name == "qwen3" and case == "with thoughts" and thinking is False):  # they were not asked for
        assert found["input_ids"][: last[0]] == asked, "the answer is learned behind what asks for it"
    assert list(asked).count(tokenizer.bos_token_id) <= 1


def scored_texts(name: str, turns: list[Turn], answer: str, shots: tuple[Example, ...] = ()) -> list[str]:
    """Return what is scored of a conversation, stretch by stretch."""
    tokenizer, prompt = tokenizer_with(TEMPLATES[name][0]), ChatPrompt("chat", ChatSettings(), shots)
    ids, scored = prompt.encode(tokenizer, Example("a", tuple(turns), answer))
    starts = [place for place in scored if place - 1 not in scored]
    ends = [place + 1 for place in scored if place + 1 not in scored]
    return [tokenizer.decode(ids[low:high]) for low, high in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_what_is_not_to_be_learned_is_read_alone(name):
    """So is a greeting with nothing before it, which nobody asks for."""
    asked, learned, read = Turn("user", "問"), Turn("assistant", "甲"), Turn("assistant", "乙", False)
    end = TEMPLATES[name][1]
    assert [one.endswith(end) for one in scored_texts(name, [asked, learned, asked], "丙")] == [True, True]
    found = scored_texts(name, [asked, read, asked], "丙")
    assert len(found) == 1 and "丙" in found[0]
    for shots in ((), (Example("s", (asked,), "丁"),)):
        found = scored_texts(name, [learned, asked], "丙", shots)
        assert len(found) == 1 and "丙" in found[0]
    assert len(scored_texts(name, [SYSTEM, learned, asked], "丙")) == 2, "a system may ask for a greeting"


@pytest.mark.parametrize("name", TEMPLATES)
def test_outputs_end_where_the_template_ends_a_turn(name):
    template, end = TEMPLATES[name]
    tokenizer = tokenizer_with(template)
    assert ChatPrompt("chat", ChatSettings()).end_ids(tokenizer) == (tokenizer.convert_tokens_to_ids(end),)


def encoded(name: str, examples: list[Example], prompt: ChatPrompt | None = None, **more: Any):
    prompt = prompt or ChatPrompt("chat", ChatSettings())
    return encode_examples(tokenizer_with(TEMPLATES[name][0]), prompt, examples, "file", **more)


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_perplexity_is_that_of_what_the_assistant_says(name):
    """Every turn of it counts, in one stream with examples of other lengths, as in a plain loop."""
    examples = encoded(name, list(CONVERSATIONS.values()))
    model = tiny_model("llama")
    wanted = []
    for example in examples:
        ids = torch.tensor([[*example.prompt, *example.answer]])
        with torch.no_grad():
            nll = -model(ids).logits[0].log_softmax(-1)
        answer = range(len(example.answer)) if example.scored is None else example.scored
        places = [len(example.prompt) + place for place in answer]
        wanted.append(math.exp(sum(float(nll[at - 1, ids[0, at]]) for at in places) / len(places)))
    assert any(example.scored for example in examples)
    use_packed_attention(model)
    assert example_perplexities(model, examples, 4096) == pytest.approx(wanted, rel=1e-4)


def test_the_system_prompt_stands_once_in_a_stream():
    system = Turn("system", "長" * 100)
    examples = encoded("qwen2.5", [Example(n, (system, Turn("user", str(n))), "答") for n in range(5)])
    shared = whole_group(examples).prefix_length
    assert shared >= 300, "every byte of it is shared"


def test_shots_become_turns_that_are_not_scored(write_rows):
    rows = [{"messages": messages_of(Example(n, (Turn("user", f"問{n}"),), f"答{n}"))} for n in range(4)]
    prompt = load_prompt("chat", 2, write_rows(rows))
    tokenizer = tokenizer_with(CHATML)
    question = (SYSTEM, Turn("user", "問"))
    asked = tokenizer.decode(prompt.ids(tokenizer, question))
    assert asked == tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "你是助理。"},
            *rows[2]["messages"],
            *rows[3]["messages"],
            {"role": "user", "content": "問"},
        ],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids, scored = prompt.encode(tokenizer, Example(0, question, "終"))
    assert tokenizer.decode([ids[place] for place in scored]) == "終<|im_end|>"
    assert prompt.digest != load_prompt("chat").digest


def test_a_cut_leaves_what_is_scored_before_it():
    [whole] = encoded("phi4", [CONVERSATIONS["several turns"]])
    length = len(whole.prompt) + 4
    [cut] = encoded("phi4", [CONVERSATIONS["several turns"]], max_length_tokens=length)
    assert (cut.prompt, cut.num_tokens, cut.is_cut) == (whole.prompt, length, True)
    assert set(cut.scored or range(len(cut.answer))) == {place for place in whole.scored if place < 4}


REFUSED = {
    "turns that do not alternate": ("gemma3", (Turn("user", "甲"), Turn("user", "乙")), "must alternate"),
    "an answer that the template changes": (
        "upper",
        (Turn("user", "甲"),),
        "does not hold what the assistant says as it is written",
    ),
    "turns that look otherwise later": (
        "numbered",
        (Turn("user", "甲"), Turn("assistant", "乙"), Turn("user", "丙")),
        "renders turn 1 in another way once others follow it",
    ),
}
ODD = {
    "upper": CHATML.replace("m['content'] + '<|im_end|>' }}]]", "m['content'] | upper + '<|im_end|>' }}]]"),
    "numbered": "{{ messages | length }}" + CHATML,
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_template_has_no_place_for_is_one_line(case):
    name, turns, problem = REFUSED[case]
    tokenizer = tokenizer_with(ODD.get(name) or TEMPLATES[name][0])
    with pytest.raises(InputError, match=problem) as error:
        encode_examples(
            tokenizer, ChatPrompt("chat", ChatSettings()), [Example(0, turns, "abc")], "rows.json"
        )
    assert str(error.value).startswith("rows.json:row 0: ")


def test_a_chat_prompt_is_loaded_again_from_its_text(tmp_path):
    prompt = for_chat(load_prompt("chat"), "prompt", "last", False)
    path = tmp_path / "prompt.yaml"
    path.write_text(prompt_text(prompt), encoding="utf-8")
    assert load_prompt(str(path)).digest == prompt.digest != load_prompt("chat").digest
    template = load_prompt("default")
    path.write_text(prompt_text(template), encoding="utf-8")
    assert load_prompt(str(path)).digest == template.digest


def test_settings_of_a_chat_need_one():
    with pytest.raises(InputError, match="loss needs prompt: chat; default is a template"):
        for_chat(load_prompt(), "prompt", "last", None)


def test_a_base_without_a_template_takes_no_conversations(evaluate, infer, write_rows):  # noqa: F811
    data = write_rows(
        [{"messages": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}]}]
    )
    for run in (evaluate, infer):
        assert "its tokenizer has no chat template, which conversations need" in run(data)
    check_chat(load_prompt("default"), tokenizer_with(None), "base")
    assert "needs prompt: chat" in evaluate(write_rows(GOOD, "good.json"), "--loss", "last")


def test_a_chat_file_is_checked(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"chat": {"lass": "all"}}), encoding="utf-8")
    with pytest.raises(InputError, match="lass"):
        load_prompt(str(path))


def test_a_changed_template_or_tokenizer_is_told(tmp_path):
    """A version was trained under one reading of its prompts; a base may read them in another way today."""
    tokenizer = tokenizer_with(LLAMA_3)
    tags = {"tokenizer_digest": tokenizer_digest(tokenizer), "template_digest": template_digest(tokenizer)}
    version = RegisteredAdapter(tmp_path, None, None, "models:/chat/1", tags, "base", "none", None)
    choice = ModelChoice(
        BaseModelSettings(), NamedAdapter(tmp_path, version), ChatPrompt("chat", ChatSettings()), 2048, ()
    )
    assert reading_in_words(choice, tokenizer) == ""
    other = tokenizer_with(CHATML)
    words = "the chat template of smollm2-135m-instruct changed since models:/chat/1 was trained"
    assert reading_in_words(choice, other) == words
    other.add_tokens(["<another>"])
    assert reading_in_words(choice, other).startswith("the tokenizer and the chat template of")
    version = replace(version, tags={})  # from before digests were kept
    assert reading_in_words(replace(choice, adapter=NamedAdapter(tmp_path, version)), other) == ""


def test_changed_weights_are_told(tiny_base, tmp_path):
    tokenizer = tokenizer_with(LLAMA_3)
    digest = base_weights_digest(str(tiny_base))
    for tag, words in ((digest, ""), ("another", f"the weights of {tiny_base} changed since models:/chat/1")):
        version = RegisteredAdapter(
            tmp_path, None, None, "models:/chat/1", {"weights_digest": tag}, str(tiny_base), "none", None
        )
        base = BaseModelSettings(name=str(tiny_base), quantization="none")
        adapter = NamedAdapter(tmp_path, version)
        choice = ModelChoice(base, adapter, ChatPrompt("chat", ChatSettings()), 2048, ())
        assert reading_in_words(choice, tokenizer).startswith(words)
        assert bool(reading_in_words(choice, tokenizer)) == bool(words)
