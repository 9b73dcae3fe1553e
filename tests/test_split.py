"""A public share of the training set leaks nothing and is kept; what sets have in common is told."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inputs import good_space, nothing_heavy_happens, tune  # noqa: F401

from qlora.config import InputError
from qlora.data.examples import examples_digest, load_examples
from qlora.data.row_shapes import Example, Turn, instruction_example
from qlora.data.split import as_row, asked_keys, count_asked, hold_out, read_keys, write_keys
from tuning.space import DataSettings
from workflows.data_sets import read_data


def examples(asked: list[int]) -> list[Example]:
    return [instruction_example(number, f"問{one}", f"答{number}") for number, one in enumerate(asked)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=80), st.floats(0.01, 0.99), st.integers(0, 9))
def test_what_is_held_out_is_never_trained_on(asked, fraction, seed):
    whole = examples(asked)
    if len(set(asked)) == 1:
        with pytest.raises(ValueError, match="all examples ask the same"):
            hold_out(whole, fraction, seed)
        return
    train, public = hold_out(whole, fraction, seed)
    assert train and public
    assert sorted([*train, *public], key=lambda example: int(example.id)) == whole
    assert not count_asked(public, asked_keys(train)) and not count_asked(train, asked_keys(public))
    assert (train, public) == hold_out(whole, fraction, seed)
    for side in (train, public):
        assert [example.id for example in side] == sorted(example.id for example in side)


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9])
def test_a_share_is_as_large_as_was_asked_for(fraction):
    draw = random.Random(1)
    whole = examples([draw.randrange(600) for _ in range(1000)])
    _, public = hold_out(whole, fraction, seed=3)
    assert abs(len(public) / 1000 - fraction) < 0.01
    assert public != hold_out(whole, fraction, seed=4)[1]


SHAPES = [
    instruction_example("a", '問\n"', "答"),
    Example(7, (Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a"), Turn("user", "v")), "b"),
    Example(1.5, (Turn("user", "u"), Turn("assistant", "a"), Turn("user", "v")), "b"),
]


def test_a_public_share_is_kept_as_a_file_that_reads_the_same(write_rows, tmp_path):
    rows = [{"instruction": f"問{n % 40}", "input": "甲" * (n % 3), "output": f"答{n}"} for n in range(100)]
    data = DataSettings(train=str(write_rows(rows)), public={"fraction": 0.2, "seed": 5})
    sets = read_data(data)
    assert abs(len(sets.public) - 20) <= 3 and len(sets.train) + len(sets.public) == 100
    assert data.public_name == f"0.2 of {data.train}, held out with seed 5"
    sets.keep_public(tmp_path / "sweep")
    kept = load_examples(tmp_path / "sweep/public.jsonl", need_output=True)
    assert (kept, examples_digest(kept)) == (sets.public, sets.digests["public"])


@pytest.mark.parametrize("kept", [SHAPES[:1], SHAPES[1:], [Example(0, (), "文\n")]])
def test_kept_rows_read_the_same(kept, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(as_row(example)) + "\n" for example in kept), encoding="utf-8")
    assert load_examples(path, need_output=True) == kept


def test_what_is_asked_in_both_sets_is_told(write_rows):
    train = write_rows([{"instruction": one, "output": "x"} for one in "甲乙丙"], "train.json")
    public = write_rows([{"instruction": one, "output": "y"} for one in "乙丁甲"], "public.json")
    words = read_data(DataSettings(train=str(train), public=str(public))).words
    assert words["public"] == "instruction + output; 2 of them ask what a training example asks"
    apart = str(write_rows([{"instruction": "丁", "output": "y"}]))
    assert read_data(DataSettings(train=str(train), public=apart)).words["public"] == "instruction + output"


def test_a_holdout_is_told_and_what_it_shares_with_the_others_is_counted(write_rows):
    train = write_rows([{"instruction": one, "output": "x"} for one in "甲乙丙"], "train.json")
    public = write_rows([{"instruction": one, "output": "y"} for one in "丁戊"], "public.json")
    held = write_rows([{"instruction": one, "output": "z"} for one in "己丁丙庚"], "held.json")
    sets = read_data(DataSettings(train=str(train), public=str(public), holdout=str(held)))
    overlap = "2 of them ask what a training or public example asks"
    assert sets.words["holdout"] == f"4 examples, instruction + output; {overlap}"
    assert sets.digests.keys() == {"train", "public", "holdout"}
    assert read_data(DataSettings(train=str(train), public=str(public))).digests.keys() == {"train", "public"}


def test_a_holdout_can_be_a_share_of_the_training_set(write_rows):
    """Holds out what is neither trained on nor public."""
    rows = [{"instruction": f"問{n}", "output": f"答{n}"} for n in range(100)]
    shares = {"public": {"fraction": 0.2}, "holdout": {"fraction": 0.25, "seed": 3}}
    sets = read_data(DataSettings(train=str(write_rows(rows)), train_examples=50, **shares))
    asked = [{example.instruction for example in each} for each in (sets.train, sets.public, sets.holdout)]
    assert [len(one) for one in asked] == [50, 20, 25]
    assert len(set.union(*asked)) == 95
    shares = {"public": {"fraction": 0.5}, "holdout": {"fraction": 0.5}}
    with pytest.raises(InputError, match="leave nothing to train on"):
        read_data(DataSettings(train=str(write_rows(rows)), **shares))


def test_what_was_trained_on_is_known_without_its_texts(tmp_path):
    """A registered adapter carries it, so that rows it is asked later can be told from those."""
    train = examples(list(range(50)))
    write_keys(tmp_path / "trained_on.bin", train)
    assert (tmp_path / "trained_on.bin").stat().st_size == 50 * 8
    keys = read_keys(tmp_path / "trained_on.bin")
    assert keys == asked_keys(train)
    assert count_asked(examples([3, 50, 4, 3]), keys) == 3


def test_a_share_of_rows_that_all_ask_the_same_is_refused(tune, write_rows):  # noqa: F811
    rows = write_rows([{"instruction": "問", "output": str(n)} for n in range(9)])
    error = tune(lambda space: space.update(data={"train": str(rows), "public": {"fraction": 0.1}}))
    assert f"{rows}: all examples ask the same" in error
    assert "less than 1" in tune(lambda space: space["data"].update(public={"fraction": 2}))


def test_fewer_examples_than_are_asked_for_are_told(write_rows):
    rows = [{"instruction": f"q{number}", "output": "a"} for number in range(20)]
    places = {"train": str(write_rows(rows)), "public": {"fraction": 0.25}}
    words = read_data(DataSettings(**places, train_examples=16, public_examples=5)).words
    assert words["train"] == "instruction + output; train_examples asks for 16"
    assert words["public"] == "instruction + output"
    assert read_data(DataSettings(**places, train_examples=15)).words["train"] == "instruction + output"
