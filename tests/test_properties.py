"""Whatever a file holds, it is read as what it says or refused on one line; packing loses no token.

Inputs are made by Hypothesis: broken bytes, JSON and YAML of any shape, numbers of any size.
"""

import json
from collections import Counter, deque
from collections.abc import Callable
from typing import TypeVar

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora.config import InputError, parse_stages
from qlora.data.examples import checked_examples
from qlora.data.prompts import EncodedExample
from qlora.packed.packing import next_pass, pack_groups, split_by_budget
from tuning.ledger import Ledger
from tuning.space import load_space

T = TypeVar("T")
text = st.text(max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
often = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refused(read: Callable[[], T]) -> T | None:
    """What there is to read; None if it is refused, which has to be on one line that prints."""
    try:
        return read()
    except InputError as error:
        refusal = str(error)
    assert refusal and refusal.isprintable()
    return None


@often
@given(content=st.binary(max_size=200), suffix=st.sampled_from(["json", "jsonl"]))
def test_bytes_are_rows_or_refused(content, suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(content)
    found = read_or_refused(lambda: list(checked_examples(path, need_output=False)))
    assert found is None, "no 200 bytes of chance are rows"


rows = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("id", "instruction", "output", "other"), text | values)
)


@often
@given(content=values | st.lists(rows | values, max_size=4), is_list=st.booleans(), need=st.booleans())
def test_rows_are_read_as_they_are_or_refused(content, is_list, need, tmp_path):
    path = tmp_path / ("rows.json" if is_list else "rows.jsonl")
    items = content if isinstance(content, list) else [content]
    path.write_text(json.dumps(content) if is_list else "\n".join(map(json.dumps, items)), encoding="utf-8")
    found = read_or_refused(lambda: list(checked_examples(path, need_output=need)))
    if found is None:
        return
    numbered = [number if row.get("id") is None else row["id"] for number, row in enumerate(items)]
    assert [example.id for example in found] == numbered
    assert [example.instruction for example in found] == [row["instruction"] for row in items]
    assert len({str(example.id) for example in found}) == len(found)
    assert not need or all(example.output for example in found)


samplers = st.dictionaries(
    st.sampled_from(["choice", "uniform", "loguniform", "randint", "quniform", "grid_search"]),
    values,
    max_size=2,
)
keys = ["base_model", "data", "search", "trial", "num_samples", "scheduler", "seed", "searcher", "prompt"]
spaces = st.dictionaries(
    st.sampled_from([*keys, "odd"]),
    values
    | st.dictionaries(st.sampled_from(["learning_rate", "lora_r", "epochs", "x"]), samplers, max_size=3),
    max_size=6,
)


@often
@given(content=spaces | values)
def test_a_space_is_one_or_refused(content, tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    space = read_or_refused(lambda: load_space(path, []))
    assert space is None or (space.search and space.num_trials > 0)


@often
@given(content=st.text(max_size=60))
def test_any_text_is_a_space_or_refused(content, tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    assert read_or_refused(lambda: load_space(path, [])) is None


@given(stages=st.lists(st.integers(1, 10**6), min_size=1, max_size=6))
def test_stages_are_read_back(stages):
    assert parse_stages("+".join(map(str, stages))) == tuple(stages)


@given(text=st.text(max_size=12) | st.integers(max_value=0) | st.booleans() | st.floats())
def test_stages_are_positive_numbers_or_refused(text):
    try:
        found = parse_stages(text)
    except ValueError:
        return
    assert found and all(count > 0 for count in found)
    assert "+".join(map(str, found)) == "+".join(str(int(part)) for part in str(text).split("+"))


@often
@given(content=values, keep=st.booleans())
def test_a_record_is_one_or_refused(content, keep, tmp_path):
    whole = {"trial_id": "42_00000", "config": {"learning_rate": 1e-3}, "status": "running", "curve": []}
    mixed = {**whole, **content} if keep and isinstance(content, dict) else content
    (tmp_path / "0000-42_00000.json").write_text(json.dumps(mixed), encoding="utf-8")
    ledger = read_or_refused(lambda: Ledger(tmp_path))
    assert ledger is None or list(ledger.records) == [mixed["trial_id"]]


tokens = st.integers(3, 30)
examples = st.builds(
    lambda number, prompt, answer: EncodedExample(str(number), (1, *prompt), (*answer, 2)),
    st.integers(0, 99),
    st.lists(tokens, min_size=1, max_size=12).map(tuple),
    st.lists(tokens, max_size=8).map(tuple),
)


@often
@given(
    trials=st.lists(st.lists(examples, min_size=1, max_size=9), min_size=1, max_size=3),
    budget=st.integers(1, 60),
)
def test_packing_loses_no_token_and_no_example(trials, budget):
    """Each answer token is a target of its own example once, behind all that goes before it."""
    queues = [deque(split_by_budget(one, budget)) for one in trials]
    seen: Counter = Counter()
    while any(queues):
        owners, groups = next_pass(queues, budget)
        assert groups, "every pass makes progress"
        assert len(groups) == 1 or sum(group.num_tokens for group in groups) <= budget
        batch = pack_groups(groups)
        targets, place = batch.targets_A.tolist(), 0
        for owner, group in zip(owners, groups, strict=True):
            assert len(group.examples) == 1 or group.num_tokens <= budget
            for name, example in zip(group.names, group.examples, strict=True):
                assert trials[owner][name] == example
                assert tuple(targets[place : place + len(example.answer)]) == example.answer
                place += len(example.answer)
                seen[owner, name] += 1
        assert place == len(targets)
        assert len(batch.input_ids_T) == sum(group.num_tokens for group in groups)
    assert seen == {(owner, name): 1 for owner, one in enumerate(trials) for name in range(len(one))}
