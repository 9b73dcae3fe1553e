"""The search table: what is in the file, and that its maker's curves are those of trials that train alone."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, WORDS

from benchmarks.search_table import make
from benchmarks.search_table.table import read_table, unpack_table, write_table
from qlora.base.model import load_tokenizer
from qlora.config import BaseModelSettings, TrialSettings
from qlora.data.examples import load_examples
from qlora.data.prompts import encode_examples, load_prompt
from qlora.lora.bank import load_bank
from qlora.perplexity import adapter_perplexities, mean_perplexity
from qlora.training import Training


def test_the_table_has_whole_curves_dense_at_first():
    table = read_table()
    drawn = make.configurations(make.CONFIGURATIONS)
    assert len({(row.number, row.seed) for row in table.rows}) == len(table.rows) == 256 + 2 * 32
    for row in table.rows:
        assert row.config == drawn[row.number] and not row.error
        stages = TrialSettings(**row.config).stages
        per_epoch = row.points[-1].step // sum(stages)
        assert len(row.points) >= 12 and sum(point.step <= per_epoch / 4 for point in row.points) >= 6
        assert [end.step for end in row.ends] == [
            per_epoch * sum(stages[:count]) for count in range(1, len(stages) + 1)
        ]
        assert {(len(end.public), len(end.unseen)) for end in row.ends} == {(250, 500)}
        last = row.points[-1].public_perplexity
        assert mean_perplexity(row.ends[-1].public) == pytest.approx(last, rel=1e-3)
    assert Path(make.TABLE).stat().st_size < 2_000_000


def test_a_table_unpacked_and_packed_again_is_the_same(tmp_path):
    unpack_table(make.TABLE, tmp_path / "parts")
    write_table(tmp_path / "parts", tmp_path / "again")
    assert read_table(tmp_path / "again") == read_table()


def test_configurations_fill_the_ranges():
    drawn = make.configurations(64)
    assert drawn == make.configurations(256)[:64]
    assert {one["epochs"] for one in drawn} == set(make.EPOCHS)
    assert {one["lora_r"] for one in drawn} == set(make.RANKS)
    rates = [one["learning_rate"] for one in drawn]
    assert make.RATES[0] <= min(rates) < 2 * make.RATES[0] and make.RATES[1] / 2 < max(rates) <= make.RATES[1]


def test_trials_made_together_are_those_made_alone_and_are_made_once(
    tiny_base, tmp_path, monkeypatch, capsys
):
    rows = [
        {
            "id": f"e{n}",
            "instruction": f"翻譯：{WORDS[n % 16]}{WORDS[n * 5 % 16]}",
            "output": WORDS[n * 3 % 16],
        }
        for n in range(40)
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows[:32]), encoding="utf-8")
    (tmp_path / "public.json").write_text(json.dumps(rows[32:]), encoding="utf-8")
    monkeypatch.setattr(make, "NUM_TRAIN", 24)
    monkeypatch.setattr(make, "NUM_UNSEEN", 8)
    monkeypatch.setattr(make, "REPEATED", 1)
    places = ["--train", str(tmp_path / "train.json"), "--public", str(tmp_path / "public.json")]
    arguments = [*places, "--base-model", str(tiny_base), "--parts", str(tmp_path / "parts")]
    monkeypatch.setattr(sys, "argv", ["make.py", *arguments, "--configurations", "2"])
    make.main()
    make.main()
    assert "4 trials are missing" in capsys.readouterr().out
    assert len(list((tmp_path / "parts").glob("facts-*"))) == 1
    write_table(tmp_path / "parts", tmp_path / "table")
    found = read_table(tmp_path / "table")
    assert sorted((row.number, row.seed) for row in found.rows) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    (row,) = [row for row in found.rows if (row.number, row.seed) == (1, 0)]

    tokenizer, prompt = load_tokenizer(str(tiny_base)), load_prompt()
    examples = {
        name: encode_examples(tokenizer, prompt, load_examples(str(tmp_path / name), need_output=True), name)
        for name in ("train.json", "public.json")
    }
    bank = load_bank(BaseModelSettings(name=str(tiny_base)))
    alone = Training(bank, examples["train.json"][:24], TrialSettings(**row.config))
    while not alone.finished:
        alone.advance(4096)
    for kind, of_kind in (("public", examples["public.json"]), ("unseen", examples["train.json"][-8:])):
        (expected,) = adapter_perplexities(bank, [(alone.adapter, of_kind)], 4096)
        assert getattr(row.ends[-1], kind) == pytest.approx(
            expected, rel=2e-3
        )  # the file rounds to thousandths


def test_the_card_counts_what_is_there():
    card = (ROOT / "benchmarks/search_table/README.md").read_text(encoding="utf-8")
    assert f"all {len(read_table().rows)} trials" in card
