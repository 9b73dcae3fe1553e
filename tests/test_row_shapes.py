"""Rows of every shape become examples; what they hold besides is told, and what they may not hold refused."""

import itertools

import pytest
from conftest import byte_tokenizer
from test_inputs import evaluate, infer, nothing_heavy_happens, refused  # noqa: F401

from qlora.config import InputError
from qlora.data.examples import as_json, examples_digest, found_shape, from_json, load_examples
from qlora.data.prompts import encode_examples, load_prompt
from qlora.data.row_shapes import Example, RowShape, Turn, instruction_example
from qlora.data.split import as_row, asked_keys
from ray_jobs.cli import tell_unused


def chat(*contents: str) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"] * 9, contents, strict=False)
    ]


def shared(*contents: str) -> list[dict[str, str]]:
    names = itertools.cycle(["human", "gpt"])
    return [{"from": name, "value": text} for name, text in zip(names, contents, strict=False)]


TURNS = (Turn("user", "甲"), Turn("assistant", "乙"), Turn("user", "丙"))
SHAPES = [
    ({"instruction": "甲", "output": "乙"}, instruction_example(0, "甲", "乙")),
    ({"instruction": "甲", "input": "", "output": "乙", "text": "all"}, instruction_example(0, "甲", "乙")),
    (
        {"instruction": "甲", "input": "丙", "output": "乙"},
        instruction_example(0, "甲\n\n### Input:\n丙", "乙"),
    ),
    ({"prompt": "甲", "completion": "乙"}, instruction_example(0, "甲", "乙")),
    ({"id": None, "prompt": "甲", "messages": chat("甲", "乙", "丙", "丁")}, Example(0, TURNS, "丁")),
    ({"conversations": shared("甲", "乙", "丙", "丁")}, Example(0, TURNS, "丁")),
    (
        {"system": "你是", "conversations": shared("甲", "乙")},
        Example(0, (Turn("system", "你是"), Turn("user", "甲")), "乙"),
    ),
    (
        {
            "messages": [
                {"role": "system", "content": ""},
                *chat("甲"),
                {"role": "assistant", "content": "乙"},
            ]
        },
        instruction_example(0, "甲", "乙"),
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "甲"}]}, *chat("", "乙")[1:]]},
        instruction_example(0, "甲", "乙"),
    ),
    ({"text": "甲乙"}, Example(0, (), "甲乙")),
]


@pytest.mark.parametrize(("row", "example"), SHAPES)
def test_shapes_are_recognised(row, example, write_rows):
    assert load_examples(write_rows([row]), need_output=True) == [example]


@pytest.mark.parametrize("output", ["", None, " \n"])
def test_an_empty_answer_of_a_test_file_is_a_placeholder(output, write_rows):
    path = write_rows([{"instruction": "甲", "output": output}])
    assert load_examples(path, need_output=False) == [instruction_example(0, "甲")]


def test_a_conversation_is_asked_for_its_last_answer(write_rows):
    """One that ends with a question has no answer yet; training leaves that question out."""
    asked = write_rows([{"messages": chat("甲", "乙", "丙")}])
    assert load_examples(asked, need_output=False) == [Example(0, TURNS, None)]
    assert load_examples(asked, need_output=True) == [Example(0, TURNS[:1], "乙")]
    answered = write_rows([{"messages": chat("甲", "乙", "丙", "丁")}], "answered.json")
    assert load_examples(answered, need_output=False) == [Example(0, TURNS, "丁")]


def test_columns_are_named(write_rows):
    path = write_rows([{"key": 3, "question": "甲", "answer": "乙", "source": "x"}])
    with pytest.raises(
        InputError, match="its columns are key, question, answer, source; name what they hold"
    ):
        load_examples(path, need_output=True)
    shape = RowShape(columns={"id": "key", "instruction": "question", "output": "answer"})
    assert load_examples(path, shape, need_output=True) == [instruction_example(3, "甲", "乙")]
    assert found_shape(path, shape).words == "instruction + output, not used: source"
    wrong = RowShape(columns={"instruction": "Question"})
    with pytest.raises(InputError, match="has no 'Question'; its columns are key, question"):
        load_examples(path, wrong, need_output=True)


def test_a_format_is_named(write_rows):
    path = write_rows([{"instruction": "甲", "output": "乙", "text": "全文"}])
    assert load_examples(path, RowShape(format="text"), need_output=True) == [Example(0, (), "全文")]
    with pytest.raises(InputError, match="has no 'prompt'"):
        load_examples(path, RowShape(format="completion"), need_output=True)
    with pytest.raises(ValueError, match="parts of rows are text: id, text"):
        RowShape(format="text", columns={"output": "x"})


def test_plain_text_is_learned_whole():
    tokenizer = byte_tokenizer()
    ids = tuple(tokenizer("甲乙", add_special_tokens=False)["input_ids"])
    [encoded] = encode_examples(tokenizer, load_prompt(), [Example(0, (), "甲乙")], "file")
    assert (encoded.prompt, encoded.answer) == ((tokenizer.bos_token_id,), (*ids, tokenizer.eos_token_id))
    tokenizer.bos_token = None
    [encoded] = encode_examples(tokenizer, load_prompt(), [Example(0, (), "甲乙")], "file")
    assert (encoded.prompt, encoded.answer) == (ids[:1], (*ids[1:], tokenizer.eos_token_id))


def test_a_template_has_no_place_for_a_conversation(evaluate, write_rows):  # noqa: F811
    rows = write_rows([{"messages": chat("甲", "乙", "丙", "丁")}])
    error = evaluate(rows, "--prompt", "default")
    assert "row 0: it is a conversation, where the prompt takes one instruction; prompt: chat takes" in error


def test_batch_inference_answers_no_plain_text(infer, write_rows):  # noqa: F811
    assert "is plain text, which asks for no answer" in infer(write_rows([{"text": "甲"}]))


def test_columns_of_a_command_line(evaluate, infer, write_rows):  # noqa: F811
    data = write_rows([{"question": "甲", "answer": " "}])
    assert "row 0: answer is empty" in evaluate(data, "--columns", "instruction=question,output=answer")
    for run in (evaluate, infer):
        assert "must read part=column" in run(data, "--columns", "question")
        assert "parts of rows are" in run(data, "--columns", "query=question")
        assert "has no 'prompt'" in run(data, "--data-format", "completion")


UNUSED = {
    "Dolly's": (
        [{"instruction": "甲", "context": "丙", "output": "乙"}],
        "instruction + output, not used: context",
    ),
    "in a later row": (
        [
            {"instruction": "甲", "output": "乙"},
            {"instruction": "甲", "input": "二", "system": "s", "output": "乙"},
        ],
        "instruction + output + input, not used: system",
    ),
    "within messages": (
        [
            {
                "messages": [
                    {"role": "user", "content": "甲", "name": "n", "weight": 1},
                    {"role": "assistant", "content": "乙", "reasoning_content": "想", "tool_calls": None},
                ]
            }
        ],
        "messages, not used: messages.name, messages.reasoning_content",
    ),
    "nothing": ([{"from": "x", "text": "甲"}], "text, not used: from"),
}


@pytest.mark.parametrize("case", UNUSED)
def test_what_is_not_used_is_told(case, write_rows, capsys):
    rows, words = UNUSED[case]
    found = found_shape(write_rows(rows))
    assert found.words == words
    tell_unused(found, ["rows.json"])
    assert capsys.readouterr().out == f"not used: {words.partition('not used: ')[2]} of rows.json\n"


def test_where_all_is_used_nothing_is_told(write_rows, capsys):
    tell_unused(found_shape(write_rows([{"instruction": "甲", "output": "乙"}])), ["rows.json"])
    assert not capsys.readouterr().out


MESSAGE = {"role": "assistant", "content": "看"}
TURN = {"role": "user", "content": "甲"}


def test_weights_are_kept_where_they_count_alone(write_rows, tmp_path):
    """A set that is written out is the same again; what is asked is the same, whatever is learned of it."""
    weighed = [TURN, {**MESSAGE, "weight": 0}, {**TURN, "content": "丙"}, MESSAGE]
    plain = [{key: one[key] for key in ("role", "content")} for one in weighed]
    some, others = (
        load_examples(write_rows([{"messages": one}], name), need_output=True)
        for one, name in ((weighed, "a.json"), (plain, "b.json"))
    )
    assert examples_digest(some) != examples_digest(others)
    assert asked_keys(some) == asked_keys(others)
    again = load_examples(write_rows([as_row(one) for one in some], "c.json"), need_output=True)
    assert again == some
    of_user = [{**one, "weight": 0.0} if one["role"] == "user" else one for one in plain]
    assert load_examples(write_rows([{"messages": of_user}]), need_output=True) == others
    of_user[0]["weight"] = 0.5
    assert load_examples(write_rows([{"messages": of_user}]), need_output=True) == others
    tested, plainly = (
        load_examples(write_rows([{"messages": one}]), need_output=False) for one in (weighed, plain)
    )
    assert tested == plainly, "in inference there is nothing to learn"


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_an_answer_that_calls_a_tool_is_not_learned_without_the_call(key, write_rows):
    path = write_rows([{"messages": [TURN, {**MESSAGE, key: [{"name": "f"}]}]}])
    with pytest.raises(InputError, match="row 0: message 1 calls a tool"):
        load_examples(path, need_output=True)


def test_weights_of_messages(write_rows):
    """As in OpenAI's format: an answer of weight 0 is read, and not learned."""
    rows = [
        {"messages": [TURN, {**MESSAGE, "weight": 0}, TURN, {**MESSAGE, "weight": 1}]},
        {"messages": [TURN, MESSAGE, TURN, {**MESSAGE, "weight": 0}]},
    ]
    both = load_examples(write_rows(rows), need_output=True)
    assert [[turn.is_learned for turn in one.turns] for one in both] == [[True, False, True], [True]]
    assert [one.output for one in both] == ["看", "看"]
    assert [from_json(as_json(one)) for one in both] == both
    plain = [{"messages": [{**one, "weight": 1} for one in row["messages"]]} for row in rows]
    others = load_examples(write_rows(plain), need_output=True)
    assert examples_digest(others[:1]) != examples_digest(both[:1])
    for weight, words in ((0, "its weights are all 0"), (0.5, "has the weight 0.5")):
        path = write_rows([{"messages": [TURN, {**MESSAGE, "weight": weight}]}])
        with pytest.raises(InputError, match=words):
            load_examples(path, need_output=True)
    asked = load_examples(write_rows([{"messages": [TURN, {**MESSAGE, "weight": 0}]}]), need_output=False)
    assert asked[0].output == "看", "a reference to compare with"
