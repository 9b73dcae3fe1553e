"""A row that kills the process at work on it costs that row and no other, and never the job's end.

The deaths are real: a module that Python runs at its start, put on the path of a real command, has processes
of Ray end by SIGKILL where a prompt holds a certain sign, or where an engine or a tokenizer is loaded.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch_inference import PROJECT, options_of, processes_of, wait_for_rows
from test_rows import write

from inference.attempts import Attempts

POISON = "毒"
GIVEN_UP = "its engine's process died 2 times"

# Runs before anything else in each process. `mend(module)` is called once inference.engine is loaded.
AT_THE_START = """
import importlib.util, os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "inference.engine":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def execute_and_mend(module):
            execute(module)
            mend(module)
        spec.loader.exec_module = execute_and_mend
        return spec

sys.meta_path.insert(0, Finder())

def end():
    os.kill(os.getpid(), signal.SIGKILL)
"""

DIES_OF_A_SIGN = f"""
def mend(module):
    whole = module.BeamEngine.generate
    def generate(self, prompts):
        if any({POISON!r} in self.tokenizer.decode(prompt) for prompt in prompts):
            end()
        return whole(self, prompts)
    module.BeamEngine.generate = generate
"""

DIES_ONCE = """
def mend(module):
    whole = module.BeamEngine.generate
    def generate(self, prompts):
        found = whole(self, prompts)
        yield next(found)
        try:
            os.close(os.open("died", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            yield from found
        else:
            end()
    module.BeamEngine.generate = generate
"""

DIES_ON_LOADING = """
def mend(module):
    def load_engine(*_):
        with open("loads", "a") as file:
            file.write(".")
        end()
    module.load_engine = load_engine
"""

DIES_AT_EVERY_ROW = """
def mend(module):
    def generate(self, prompts):
        with open("deaths", "a") as file:
            file.write(".")
        end()
    module.BeamEngine.generate = generate
"""

RAISES_ON_LOADING = """
def mend(module):
    def load(*_):
        with open("loads", "a") as file:
            file.write(".")
        raise {error}
    if "default_worker" in sys.argv[0]:
        {function} = load
"""

TOKENIZER = 'sys.modules["qlora.base.model"].load_tokenizer'  # which the pipeline imports after the engine

RAISES_AT_EVERY_ROW = """
def mend(module):
    def generate(self, prompts):
        raise ValueError("no kernel fits")
    module.BeamEngine.generate = generate
"""


def rows_with(poisoned: set[int], count: int) -> list[dict[str, str]]:
    return [
        {"id": f"r{n}", "instruction": f"翻譯第{n}句{POISON if n in poisoned else ''}"} for n in range(count)
    ]


def batch(
    folder: Path, tiny_base: Path, source: Path, trouble: str, *options: str, name: str = "out.json"
) -> subprocess.Popen:
    """Start a job in whose processes `trouble` is at work. It may write to the folder that it stands in."""
    (folder / "start").mkdir(exist_ok=True)
    text = textwrap.dedent(AT_THE_START + trouble).replace('open("', f'open("{folder}/')
    (folder / "start/sitecustomize.py").write_text(text.replace('"died"', f'"{folder}/died"'))
    return subprocess.Popen(
        [
            sys.executable,
            str(PROJECT / "ray_jobs/batch_infer.py"),
            *options_of(tiny_base, source, folder / name),
            *options,
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "start")},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def ended(process: subprocess.Popen, code: int, seconds: float = 240) -> str:
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it stops its Ray
        out, _ = process.communicate(timeout=60)
        raise AssertionError(f"did not end within {seconds} s: {out}") from None
    assert process.returncode == code, out
    assert "Traceback" not in out
    return out


def outputs(path: Path) -> dict[str, str]:
    return {row["id"]: row["output"] for row in json.loads(path.read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def undisturbed(tiny_base, tmp_path_factory) -> dict[str, str]:
    """Texts of rows of `rows_with`, by instruction, made by one engine without Ray."""
    from inference.engine import ServedModel, load_engine
    from qlora.base.model import load_tokenizer
    from qlora.config import BaseModelSettings, DecodingSettings
    from qlora.data.prompts import encode_prompt, load_prompt

    base = BaseModelSettings(name=str(tiny_base), quantization="none")
    engine = load_engine(ServedModel(base), DecodingSettings(max_new_tokens=24))
    tokenizer, prompt = load_tokenizer(base.name), load_prompt()
    rows = rows_with(set(), 48)
    prompts = [encode_prompt(tokenizer, prompt.render(row["instruction"])) for row in rows]
    return {rows[index]["id"]: text for index, text, _ in engine.generate(prompts)}


@pytest.mark.slow
def test_rows_that_kill_their_engine_are_given_up_and_no_others(tiny_base, undisturbed, tmp_path):
    """Two in one block, one in another."""
    poisoned = {3, 5, 40}
    source = write(tmp_path / "in.jsonl", rows_with(poisoned, 48), lines=True)
    out = ended(batch(tmp_path, tiny_base, source, DIES_OF_A_SIGN), code=4)
    assert "3 FAILED" in out
    assert outputs(tmp_path / "out.json") == {
        name: "" if int(name[1:]) in poisoned else text for name, text in undisturbed.items()
    }
    errors = json.loads((tmp_path / "out.json.errors.json").read_text())
    assert [error["row"] for error in errors] == sorted(poisoned)
    assert {error["error"] for error in errors} == {GIVEN_UP}
    assert not (tmp_path / ".out.json.work").exists()


class KilledError(Exception):
    """The end of a simulated process."""


def work_through(
    blocks: list[list[int]], poisoned: set[int], lost: list[int]
) -> tuple[dict[int, str], int, str]:
    """Do blocks in turn, as one worker of a pool that is started again after each death.

    A piece with a poisoned row is a death, and so is each number of begun pieces in `lost`. Returns results,
    the number of deaths, and why work was stopped.
    """
    attempts, results, deaths, begun = Attempts("engine"), {}, 0, 0
    assert attempts.start("a") == ""
    for block in blocks:
        while True:
            found = {}
            try:
                pieces, errors = attempts.plan("a", block)
                for number, piece in enumerate(pieces):
                    if number:
                        attempts.begin("a", piece)
                    begun += 1
                    if poisoned & set(piece) or begun in lost:
                        raise KilledError
                    found.update(dict.fromkeys(piece, "text"))
                    attempts.end("a", piece)
            except KilledError:
                deaths += 1
                if stop := attempts.start("a"):
                    return results, deaths, stop
            else:
                results |= found | errors
                break
    return results, deaths, ""


@given(
    sizes=st.lists(st.integers(1, 600), min_size=1, max_size=6),
    poisoned=st.sets(st.integers(0, 600), max_size=6),
    lost=st.lists(st.integers(1, 60), max_size=2, unique=True),
)
@settings(deadline=None)
def test_only_rows_that_kill_are_given_up_after_a_few_deaths(sizes, poisoned, lost):
    """Two lost nodes at any time cost no row, nor does one beside rows that kill; deaths are bounded.

    A row beside one that kills shares its first death: two nodes lost just while it is alone then cost it.
    """
    ends = list(itertools.accumulate(sizes))
    blocks = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    poisoned &= set(range(ends[-1]))
    lost = lost[:1] if poisoned else lost
    results, deaths, stop = work_through(blocks, poisoned, lost)
    assert stop == ""
    assert results == {row: GIVEN_UP if row in poisoned else "text" for row in range(ends[-1])}
    assert deaths <= 6 * len(poisoned) + len(lost)


def test_a_worker_that_is_replaced_leaves_its_rows_suspect():
    """Its name never comes back, as if its node and Ray's memory of it were gone."""
    attempts = Attempts("engine")
    attempts.start("a")
    assert attempts.plan("a", [1, 2, 3]) == ([[1, 2, 3]], {})
    attempts.start("b")
    assert attempts.plan("b", [1, 2, 3]) == ([[1], [2], [3]], {})


def test_deaths_are_counted_in_turn_only():
    attempts = Attempts("engine")
    for _ in range(50):
        assert attempts.start("a") == attempts.start("a") == ""
        attempts.plan("b", [1])
        attempts.end("b", [1])
    assert [bool(attempts.start("a")) for _ in range(3)] == [False, False, True]


@pytest.mark.slow
def test_an_engine_that_dies_once_costs_no_row(tiny_base, undisturbed, tmp_path):
    source = write(tmp_path / "in.jsonl", rows_with(set(), 48), lines=True)
    ended(batch(tmp_path, tiny_base, source, DIES_ONCE), code=0)
    assert (tmp_path / "died").exists()
    assert outputs(tmp_path / "out.json") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "counted", "most"), [(DIES_ON_LOADING, "loads", 3), (DIES_AT_EVERY_ROW, "deaths", 20)]
)
def test_engines_that_always_die_stop_the_job_in_one_line(
    trouble, counted, most, tiny_base, undisturbed, tmp_path
):
    """Keep what was done before for the next run."""
    source = write(tmp_path / "in.jsonl", rows_with(set(), 48), lines=True)
    out = ended(batch(tmp_path, tiny_base, source, trouble), code=3, seconds=900)
    lines = [line for line in out.splitlines() if "process died" in line]
    assert len(lines) == 1
    assert "--resume" in lines[0]
    assert len((tmp_path / counted).read_text()) == most
    ended(batch(tmp_path, tiny_base, source, "def mend(module): pass", "--resume"), code=0)
    assert outputs(tmp_path / "out.json") == undisturbed


@pytest.mark.slow
def test_an_engine_that_fails_at_every_prompt_stops_the_job_in_one_line(tiny_base, undisturbed, tmp_path):
    """Its rows have no fault: none is given up, and all are done once the engine works again."""
    source = write(tmp_path / "in.jsonl", rows_with(set(), 48), lines=True)
    out = ended(batch(tmp_path, tiny_base, source, RAISES_AT_EVERY_ROW), code=3)
    (line,) = [line for line in out.splitlines() if "no kernel fits" in line]
    assert "engines fail at every prompt (ValueError: no kernel fits)" in line
    assert "--resume" in line
    assert not (tmp_path / "out.json").exists()
    ended(batch(tmp_path, tiny_base, source, "def mend(module): pass", "--resume"), code=0)
    assert outputs(tmp_path / "out.json") == undisturbed
    assert not (tmp_path / "out.json.errors.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "error", "told", "times"),
    [
        ("module.load_engine", "OSError('no disk')", "the engine can't be loaded (OSError: no disk)", 3),
        (TOKENIZER, "OSError('no disk')", "the tokenizer can't be loaded (OSError: no disk)", 3),
        (TOKENIZER, "sys.modules['qlora.config'].InputError('base', 'not here')", "base: not here;", 1),
    ],
    ids=["engine", "tokenizer", "tokenizer refused"],
)
def test_what_cannot_be_loaded_stops_the_job_in_one_line(function, error, told, times, tiny_base, tmp_path):
    source = write(tmp_path / "in.jsonl", rows_with(set(), 48), lines=True)
    trouble = RAISES_ON_LOADING.format(function=function, error=error)
    out = ended(batch(tmp_path, tiny_base, source, trouble), code=3, seconds=900)
    (line,) = [line for line in out.splitlines() if told in line]
    assert "--resume" in line
    assert len((tmp_path / "loads").read_text()) == times


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["Tokenise", "RowReader", "Witness"])
def test_other_processes_of_a_job_that_die_cost_no_row(victims, tiny_base, undisturbed, tmp_path):
    source = write(tmp_path / "in.jsonl", rows_with(set(), 48), lines=True)
    job = batch(tmp_path, tiny_base, source, "def mend(module): pass")
    started = time.monotonic()
    while not processes_of(job, victims):
        assert time.monotonic() - started < 100
        time.sleep(0.02)
    for process in processes_of(job, victims):
        os.kill(process, signal.SIGKILL)
    ended(job, code=0)
    assert outputs(tmp_path / "out.json") == undisturbed


ANSWERS_AT_ONCE = """
def mend(module):
    module.BeamEngine.generate = lambda self, prompts: ((n, "答", 1) for n in range(len(prompts)))
"""


@pytest.mark.slow
def test_what_serves_the_rows_of_a_large_job_may_die(tiny_base, tmp_path):
    """With so many rows what it is made of lies in Ray's object store, from where it has to come again."""
    count = 60_000
    rows = [{"id": f"r{n}", "instruction": f"第{n}句"} for n in range(count)]
    source = write(tmp_path / "in.jsonl", rows, lines=True)
    job = batch(tmp_path, tiny_base, source, ANSWERS_AT_ONCE)
    wait_for_rows(tmp_path, 100)
    (reader,) = processes_of(job, "RowReader")
    os.kill(reader, signal.SIGKILL)
    ended(job, code=0)
    assert len(json.loads((tmp_path / "out.json").read_text())) == count
