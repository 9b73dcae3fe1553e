"""A batch job's journal and its last files hold, whatever happens: damage, a full disk, a kill anywhere."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch_inference import PROJECT, options_of
from test_rows import ROWS, write

from inference.job import open_job
from inference.predictions import Journal, beside, work_folder
from qlora.config import InputError
from qlora.failpoints import passages

SETTINGS = {"model": {"base": "a", "adapter": None}, "generation settings": {"num_beams": 3}}
WRITTEN = {0: ("天\n地", None), 1: ("", None), 2: (None, "too long"), 3: ('["', None), 5: ("玄黃" * 9, None)}
NUM_ROWS = 8


def journal_of(folder: Path) -> Path:
    """A journal with the rows of WRITTEN, in two appends, by two engines."""
    journal = Journal(folder, SETTINGS, NUM_ROWS, resume=False)
    rows = [(index, *WRITTEN[index]) for index in (3, 0, 5, 1, 2)]
    journal.append(rows[:3], "one")
    journal.append(rows[3:], "two")
    journal.close()
    return journal.path


def resumed(folder: Path) -> Journal:
    return Journal(folder, SETTINGS, NUM_ROWS, resume=True)


def rows_in(journal: Journal) -> dict[int, tuple[str | None, str | None]]:
    missing = set(journal.missing())
    return {index: journal.read(index) for index in range(NUM_ROWS) if index not in missing}


def lines_after_damage(path: Path, change) -> tuple[Journal, list[bytes]]:
    """Change the lines of a journal, and resume it twice: the second time nothing may be left to mend."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))
    first = resumed(path.parent)
    kept = rows_in(first)
    first.close()
    again = resumed(path.parent)
    assert again.damage == ""
    assert rows_in(again) == kept
    assert not list(path.parent.glob(".*.part"))
    again.close()
    return first, path.read_bytes().splitlines()


@pytest.mark.parametrize(
    ("change", "lost", "words"),
    [
        (lambda lines: [*lines[:-1], lines[-1][:-5]], 1, "1 damaged line is left out"),
        (lambda lines: [*lines[:2], lines[2][:7] + b"\n", *lines[3:]], 1, "1 damaged line is left out"),
        (lambda lines: [*lines[:2], lines[2][:7], *lines[3:]], 2, "1 damaged line is left out"),
        (lambda lines: [*lines[:2], b"\0" * len(lines[2]), *lines[3:]], 2, "1 damaged line is left out"),
        (lambda lines: [*lines, b"\0" * 4096], 0, "1 damaged line is left out"),
        (
            lambda lines: [*lines, b"\xff\xfe\n", b"{\n", b"[]\n"],
            0,
            "3 damaged lines are left out; their rows",
        ),
        (lambda lines: [*lines, *lines[1:]], 0, "5 repeated lines are left out"),
        (lambda lines: [*lines[:3], *lines[4:]], 1, ""),
        (lambda lines: lines, 0, ""),
    ],
    ids=["cut at the end", "cut", "joined", "nulls", "nulls at the end", "garbage", "twice", "gone", "whole"],
)
def test_broken_lines_are_left_out_and_told(change, lost, words, tmp_path):
    journal, _ = lines_after_damage(journal_of(tmp_path), change)
    assert len(journal.missing()) == NUM_ROWS - len(WRITTEN) + lost
    assert journal.num_done == len(WRITTEN) - lost
    assert words in journal.damage
    assert bool(words) == bool(journal.damage)


@pytest.mark.parametrize("index", ["-1", "8", "true", "1.0", '"1"', "null", "1" * 5000, "[1]"])
@pytest.mark.parametrize("content", ['[%s, "text"]', '[%s, null, "error"]'])
def test_lines_of_unknown_rows_are_left_out(index, content, tmp_path):
    """Such lines are sound JSON, with a sound checksum, as another version of this code might write them."""
    from inference.predictions import _line

    path = journal_of(tmp_path)
    sum_before = int(path.read_bytes()[2:10], 16)
    lines = [*path.read_bytes().splitlines(keepends=True), _line((content % index).encode(), sum_before)]
    path.write_bytes(b"".join(lines))
    journal = resumed(tmp_path)
    assert "1 damaged line" in journal.damage
    assert rows_in(journal) == WRITTEN


@pytest.mark.parametrize(
    "content", ["[4, 1]", "[4, null]", '[4, "a", "b"]', "[4]", '{"row": 4}', "4", "[4, null, 1]"]
)
def test_lines_of_wrong_types_are_left_out(content, tmp_path):
    from inference.predictions import _line

    path = journal_of(tmp_path)
    sum_before = int(path.read_bytes()[2:10], 16)
    path.write_bytes(path.read_bytes() + _line(content.encode(), sum_before))
    journal = resumed(tmp_path)
    assert "1 damaged line" in journal.damage
    assert rows_in(journal) == WRITTEN


@pytest.mark.parametrize(
    "change",
    [
        lambda first: first[:20],
        lambda first: first[:-1],
        lambda first: b"",
        lambda first: b"\0" * len(first),
        lambda first: first[:30] + b"\xff" + first[31:],
        lambda first: first.replace(b"num_beams", b"num_beast"),
        lambda first: b"[[" * 5000 + b"\n",
    ],
)
def test_a_damaged_first_line_is_called_so(change, tmp_path):
    path = journal_of(tmp_path)
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(change(first + b"\n") + rest)
    with pytest.raises(InputError, match="is damaged; run without --resume to start afresh"):
        resumed(tmp_path)
    assert len(Journal(tmp_path, SETTINGS, NUM_ROWS, resume=False).missing()) == NUM_ROWS


def test_a_journal_of_the_code_before_is_taken_over(tmp_path):
    """Its lines have no checksums; one is cut, one is of an unknown row."""
    lines = [json.dumps(SETTINGS), '[1, "一"]', '[9, "x"]', '[0, null, "too long"]', '[2, "cu']
    (tmp_path / "journal.jsonl").write_text("\n".join(lines), encoding="utf-8")
    journal = resumed(tmp_path)
    assert rows_in(journal) == {0: (None, "too long"), 1: ("一", None)}
    assert "2 damaged lines" in journal.damage
    journal.append([(2, "二", None)])
    journal.close()
    again = resumed(tmp_path)
    assert rows_in(again) == {0: (None, "too long"), 1: ("一", None), 2: ("二", None)}
    assert again.damage == ""


LINES = [b'\n[4, "x"]\n', b"\n[0, 1]\n", b"\n"]
damages = st.lists(
    st.one_of(
        st.tuples(st.just("cut"), st.integers(0, 400)),
        st.tuples(st.just("nulls"), st.integers(0, 400), st.integers(1, 60)),
        st.tuples(st.just("drop"), st.integers(0, 400), st.integers(1, 60)),
        st.tuples(st.just("insert"), st.integers(0, 400), st.binary(min_size=1, max_size=40)),
        st.tuples(
            st.just("insert"), st.integers(0, 400), st.sampled_from([b'\n[4, "x"]\n', b"\n[0, 1]\n", b"\n"])
        ),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(damages=damages)
def test_no_damage_makes_up_a_row(damages, tmp_path_factory):
    """Whatever becomes of bytes after the first line, only what was written is read, and appends go on."""
    folder = tmp_path_factory.mktemp("work")
    path = journal_of(folder)
    first, _, rest = path.read_bytes().partition(b"\n")
    for kind, place, *more in damages:
        start = min(place, len(rest))
        if kind == "cut":
            rest = rest[:start]
        elif kind == "nulls":
            rest = rest[:start] + b"\0" * min(more[0], len(rest) - start) + rest[start + more[0] :]
        elif kind == "drop":
            rest = rest[:start] + rest[start + more[0] :]
        else:
            rest = rest[:start] + more[0] + rest[start:]
    path.write_bytes(first + b"\n" + rest)
    journal = resumed(folder)
    found = rows_in(journal)
    assert found.items() <= WRITTEN.items()
    assert journal.engines <= {"one", "two"}
    journal.append([(index, *WRITTEN[index]) for index in WRITTEN], "one")
    journal.close()
    again = resumed(folder)
    assert again.damage == ""
    assert rows_in(again) == WRITTEN
    again.close()
    shutil.rmtree(folder)


def test_a_disk_that_gets_full_leaves_a_journal_that_can_be_read(tmp_path):
    """The kernel takes a part of an append, and refuses the rest; space that is freed is used again."""
    journal = Journal(tmp_path, SETTINGS, NUM_ROWS, resume=False)
    journal.append([(0, "天", None)])
    whole = journal.path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 40, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            journal.append([(1, "地", None), (2, "玄" * 40, None)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert journal.path.stat().st_size == whole + 40
    assert journal.missing() == [1, 2, 3, 4, 5, 6, 7]
    kept = Path(shutil.copytree(tmp_path, tmp_path.with_name("kept")))
    stopped = resumed(kept)
    assert rows_in(stopped) == {0: ("天", None), 1: ("地", None)}
    assert "1 damaged line" in stopped.damage
    assert journal.append([(1, "地", None)]) == 1
    assert rows_in(journal) == {0: ("天", None), 1: ("地", None)}


def test_what_is_in_the_way_of_a_jobs_files_is_told(tmp_path):
    source = write(tmp_path / "in.json", ROWS)
    output = tmp_path / "out.json"

    def problem() -> str:
        with pytest.raises(InputError) as caught, open_job(source, output):
            pass
        return str(caught.value)

    for name in ("lock", "rows.jsonl", "journal.jsonl"):
        (work_folder(output) / name).mkdir(parents=True)
        assert f"holds a folder {name}" in problem()
        shutil.rmtree(work_folder(output))
    beside(output, "errors").mkdir()
    assert "errors.json: is a folder; remove it" in problem()
    beside(output, "errors").rmdir()
    work_folder(output).write_text("a file")
    assert "can't be a folder for the job's rows" in problem()
    work_folder(output).unlink()
    output = source / "out.json"
    assert "can't be a folder for the job's rows" in problem()


def test_what_a_kill_left_behind_is_removed_and_nothing_else(tmp_path):
    """Broken rows are read from the input again."""
    source = write(tmp_path / "in.json", ROWS)
    output = tmp_path / "out.json"
    folder = work_folder(output)
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(b"\0\xff broken")
    left = [
        folder / ".rows.jsonl.12.part",
        tmp_path / ".out.json.7.part",
        tmp_path / ".out.json.meta.json.8.part",
    ]
    others = [tmp_path / ".out.json.other.json.9.part", tmp_path / ".out.jsonl.9.part", tmp_path / ".a.part"]
    for path in [*left, *others]:
        path.write_text("half")
    (tmp_path / ".out.json.11.part").mkdir()
    (tmp_path / ".out.json.11.part/journal.jsonl").write_text("half")
    with open_job(source, output) as rows:
        assert [row.id for row in rows.read(0, len(rows))] == [row["id"] for row in ROWS]
        assert {path.name for path in tmp_path.glob(".*.part")} == {path.name for path in others}
        assert not list(folder.glob(".*.part"))


# One process loads what commands load, once, and then becomes the command in as many copies as are asked for.
MANY_COMMANDS = """
import json, os, sys
import inference.job, inference.pipeline, workflows.batch_summary, workflows.model_choice
import ray_jobs.batch_infer
from workflows.session import run

for line in sys.stdin:
    points, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.environ["QLORA_FAILPOINTS"] = points
            sys.argv = ["batch_infer.py", *arguments]
            run(ray_jobs.batch_infer.main)
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    print("ended", os.waitstatus_to_exitcode(status), flush=True)
"""
OF_THE_RUN = ("rows_generated", "workers", "tokens", "seconds", "rows_per_second")


def killed_at(place: str, points: Path) -> Path:
    """A folder of failpoints that has the process end at this place."""
    points.mkdir()
    (points / "kill").write_text(place)
    return points


def files_of(folder: Path) -> dict[str, object]:
    """The files of a finished job, without what its meta file says of the run itself."""
    assert all(path.is_file() for path in folder.iterdir())
    found: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir()}
    meta = json.loads((folder / "out.json.meta.json").read_text())
    found["out.json.meta.json"] = {
        key: value for key, value in meta.items() if not key.startswith(OF_THE_RUN)
    }
    return found


def command_in(folder: Path, tiny_base: Path, points: Path, *options: str) -> int:
    arguments = [*options_of(tiny_base, folder / "in.json", folder / "out.json"), *options]
    return subprocess.run(
        [sys.executable, str(PROJECT / "ray_jobs/batch_infer.py"), *arguments],
        env={**os.environ, "QLORA_FAILPOINTS": str(points)},
        capture_output=True,
        check=False,
    ).returncode


@pytest.fixture(scope="module")
def whole(tiny_base, tmp_path_factory) -> Path:
    """The folder of a job that nothing disturbed. One of its rows failed."""
    folder = tmp_path_factory.mktemp("whole")
    rows = [{"id": f"r{n}", "instruction": f"翻譯第{n}句", "output": "甲"} for n in range(24)]
    rows[3]["instruction"] = "長" * 2000
    write(folder / "in.json", rows)
    assert command_in(folder, tiny_base, folder / "points") == 4
    shutil.rmtree(folder / "points")
    return folder


@pytest.mark.slow
def test_a_job_that_is_done_is_not_done_again(whole, tiny_base, tmp_path):
    """So that a loop that resumes until it is told 0 or 4 does no work twice; changed texts are made anew."""
    folder = tmp_path / "job"
    shutil.copytree(whole, folder)
    at = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert command_in(folder, tiny_base, tmp_path / "points", "--resume") == 4
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == at
    (folder / "out.json").write_text("[]")
    assert command_in(folder, tiny_base, tmp_path / "points", "--resume") == 4
    assert files_of(folder) == files_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        "rename batch rows after 1",
        "write batch journal after 1",
        "rename batch journal after 1",
        "journal append before 1",
        "journal append after 2",
        "batch work folder moved after 1",
        "batch work folder removed after 1",
    ],
)
def test_a_job_that_is_killed_ends_in_the_files_of_one_that_was_not(place, whole, tiny_base, tmp_path):
    shutil.copy(whole / "in.json", tmp_path)
    points = killed_at(place, tmp_path.with_name("points"))
    assert command_in(tmp_path, tiny_base, points) == -signal.SIGKILL
    assert command_in(tmp_path, tiny_base, points, "--resume") == 4
    assert files_of(tmp_path) == files_of(whole)
    shutil.rmtree(points)


@pytest.mark.slow
def test_a_kill_between_any_two_of_the_last_writes_changes_no_file(whole, tiny_base, tmp_path):
    """All rows are done, so that no run needs Ray; files of a job before this one are in the way."""
    ready = tmp_path / "ready"
    ready.mkdir()
    shutil.copy(whole / "in.json", ready)
    points = killed_at("write predictions before 1", tmp_path / "points")
    assert command_in(ready, tiny_base, points) == -signal.SIGKILL
    (ready / "out.json").write_text("[]")
    (ready / "out.json.errors.json").write_text("[]")
    commands = subprocess.Popen(
        [sys.executable, "-c", MANY_COMMANDS],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def ended(folder: Path, points: Path) -> int:
        points.mkdir(exist_ok=True)
        options = [*options_of(tiny_base, folder / "in.json", folder / "out.json"), "--resume"]
        commands.stdin.write(json.dumps([str(points), options]) + "\n")
        commands.stdin.flush()
        while not (line := commands.stdout.readline()).startswith("ended"):
            assert line, "the process of all commands is gone"
        return int(line.split()[1])

    undisturbed = Path(shutil.copytree(ready, tmp_path / "undisturbed"))
    assert ended(undisturbed, tmp_path / "counted") == 4
    assert files_of(undisturbed) == files_of(whole)
    places = [
        f"{name} {when} 1"
        for name in passages(tmp_path / "counted")
        for when in ("before", "after")
        if not (name.startswith("batch work folder") and when == "after")
        and name != "batch work folder removed"
    ]
    assert len(places) >= 17
    for number, place in enumerate(places):
        folder = Path(shutil.copytree(ready, tmp_path / f"killed-{number}"))
        points = killed_at(place, tmp_path / f"points-{number}")
        assert ended(folder, points) == -signal.SIGKILL, place
        assert ended(folder, points) == 4, place
        assert files_of(folder) == files_of(whole), place
    commands.stdin.close()
    assert commands.wait(60) == 0
