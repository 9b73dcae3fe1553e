"""What batch inference keeps: rows read in pieces, a journal, outputs in order, their scores."""

import json
from pathlib import Path

import pytest

from inference.predictions import Journal, write_predictions
from inference.rows import store_rows
from inference.scores import Scores
from qlora.config import InputError
from qlora.data import json_rows
from qlora.data.sources import read_rows

ROWS = [
    {"id": f"r{n}", "instruction": f'翻譯：{"甲乙丙" * n}「"\\{{}}」\n', "output": "天地" * n}
    for n in range(1, 40)
]


def write(path: Path, rows: list, *, lines: bool = False, indent: int | None = None) -> Path:
    items = [
        json.dumps(row, ensure_ascii=n % 2 == 0, indent=None if lines else indent)
        for n, row in enumerate(rows)
    ]
    path.write_text("\n".join(items) if lines else "[" + ",\n".join(items) + "]\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("form", ["list", "indented", "lines"])
def test_rows_are_read_whatever_the_pieces(piece, form, tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "_PIECE_BYTES", piece)
    name, lines = ("in.jsonl", True) if form == "lines" else ("in.json", False)
    path = write(tmp_path / name, ROWS, lines=lines, indent=2 if form == "indented" else None)
    rows = store_rows(path, tmp_path / "work")
    assert len(rows) == len(ROWS)
    assert [(r.id, r.instruction, r.output) for r in rows.read(0, len(ROWS))] == [
        tuple(row.values()) for row in ROWS
    ]
    assert rows.read(5, 6)[0].id == "r6"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"id": "a", "instruction": "x"}', "line 1: is not valid JSON"),
        ('[{"id": "a", "instruction": "x"}\n {"id": "b"}]', "line 2: is not valid JSON"),
        ('[{"id": "a", "instruction": "x"},\n\n {"id: "b"}]', "line 3: is not valid JSON"),
        ('[{"id": "a", "instruction": "x"}] 1', "Extra data"),
        ('[{"id": "a", "instruction": "x"},]', "is not valid JSON"),
        ('{"id": "a"}', "row 0: is of no known shape; its columns are id"),
        (
            '{"data": [\n{"id": "a"}]}',
            "must be a JSON list of rows, or one row a line, not an object of several",
        ),
        ("12", "must be a JSON list of rows, or one row a line, not a number"),
        ("[]", "holds no rows"),
        ("[" * 200_000, "nested too deeply"),
    ],
)
def test_what_is_no_list_of_rows_is_refused(content, problem, tmp_path):
    path = tmp_path / "in.json"
    path.write_text(content)
    with pytest.raises(InputError, match=problem):
        store_rows(path, tmp_path / "work")


def test_bad_lines_are_named(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": "a", "instruction": "x"}\n\n{"id": \n')
    with pytest.raises(InputError, match="line 3: is not valid JSON"):
        store_rows(path, tmp_path / "work")


def test_a_journal_keeps_whole_lines_only(tmp_path):
    journal = Journal(tmp_path, {"model": "a"}, 4, resume=False)
    assert journal.append([(2, "二", None), (0, None, "too long")]) == 2
    assert journal.append([(2, "again", None)]) == 0
    journal.close()
    with open(journal.path, "ab") as file:
        file.write(b'[1, "torn')
    resumed = Journal(tmp_path, {"model": "a"}, 4, resume=True)
    assert resumed.missing() == [1, 3]
    resumed.append([(1, "一", None)])
    assert [resumed.read(index) for index in (0, 1, 2)] == [(None, "too long"), ("一", None), ("二", None)]
    resumed.close()
    assert Journal(tmp_path, {"model": "a"}, 4, resume=False).missing() == [0, 1, 2, 3]


def test_another_jobs_rows_are_never_mixed_in(tmp_path):
    Journal(tmp_path, {"model": {"base": "a"}, "prompt": "p"}, 4, resume=False).close()
    with pytest.raises(InputError, match="a job with another model"):
        Journal(tmp_path, {"model": {"base": "b"}, "prompt": "p"}, 4, resume=True)


def test_a_job_from_before_a_choice_came_is_gone_on_with(tmp_path):
    """A setting that it does not name is one that it leaves open; one that is given is another job's."""
    Journal(tmp_path, {"generation settings": {"num_beams": 3, "seed": None}}, 4, resume=False).close()
    today = {"num_beams": 3, "seed": None, "stop": None}
    Journal(tmp_path, {"generation settings": today}, 4, resume=True).close()
    with pytest.raises(InputError, match="a job with another generation settings"):
        Journal(tmp_path, {"generation settings": {**today, "stop": ["a"]}}, 4, resume=True)


def test_failed_rows_are_kept_apart(tmp_path):
    rows = store_rows(write(tmp_path / "in.json", ROWS[:3]), tmp_path / "work")
    journal = Journal(tmp_path / "work", {}, 3, resume=False)
    journal.append([(2, "c", None), (1, None, "too long"), (0, "a", None)])
    seen: list[str] = []
    errors = write_predictions(
        tmp_path / "out.json", rows, journal, lambda example, text: seen.append(example.id + text)
    )
    assert (
        errors
        == json.loads((tmp_path / "out.json.errors.json").read_text())
        == [{"row": 1, "id": "r2", "error": "too long"}]
    )
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"id": "r1", "output": "a"},
        {"id": "r2", "output": ""},
        {"id": "r3", "output": "c"},
    ]
    assert seen == ["r1a", "r3c"]


def test_scores_of_equal_and_of_unrelated_texts():
    same, other = Scores(), Scores()
    for text in ("天地玄黃宇宙洪荒", "日月盈昃辰宿列張"):
        same.add(text, text)
        other.add("全然不同的一句話", text)
    assert same.summary() == {"chrf": 100.0, "bleu": 100.0, "exact_match": 1.0, "count": 2}
    assert other.summary()["exact_match"] == 0
    assert other.summary()["chrf"] < 10


def test_what_is_broken_is_told_before_the_rest_is_read(tmp_path, monkeypatch):
    """A list that breaks off in its first row is not read to its end, however long it is."""
    monkeypatch.setattr(json_rows, "_PIECE_BYTES", 1 << 10)
    path = tmp_path / "broken.json"
    path.write_text('[{"id": "a" "instruction": "b"},\n' + '{"id": "c", "instruction": "d"},\n' * 100_000)
    read = []
    whole = json_rows._Text._more

    def counting(self) -> bool:
        found = whole(self)
        read.append(self._file.tell())
        return found

    monkeypatch.setattr(json_rows._Text, "_more", counting)
    with pytest.raises(InputError, match="line 1: is not valid JSON: Expecting ',' delimiter at column 13"):
        store_rows(path, tmp_path / "work")
    assert max(read) < 10_000 < path.stat().st_size


def test_a_quote_that_is_missing_does_not_take_the_memory_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "_PIECE_BYTES", 1 << 10)
    monkeypatch.setattr(json_rows, "MOST_ROW_BYTES", 1 << 14)
    path = tmp_path / "open.json"
    path.write_text('[{"id": "a", "instruction": "' + "x" * 200_000)
    with pytest.raises(InputError, match="line 1: begins a row of more than"):
        store_rows(path, tmp_path / "work")
    lines = tmp_path / "open.jsonl"
    lines.write_text('{"id": "a"}\n{"id": "' + "x" * 200_000)
    with pytest.raises(InputError, match="begins a row of more than"):
        list(read_rows(lines))


def test_scattered_rows_are_read_alone(tmp_path):
    rows = store_rows(write(tmp_path / "in.json", ROWS), tmp_path / "work")
    wanted = [2, 3, 17, 30]
    content = bytearray(rows.path.read_bytes())
    for number in set(range(len(ROWS))) - set(wanted):  # whoever reads these stumbles
        content[rows.offsets[number]] = ord("!")
    rows.path.write_bytes(content)
    assert [row.id for row in rows.read_some(wanted)] == [ROWS[number]["id"] for number in wanted]
