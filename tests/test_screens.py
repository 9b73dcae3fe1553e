"""What a command prints goes to a screen, a pipe or a file, any of which may be closed: its work goes on."""

import copy
import io
import os
import pickle
import pty
import signal
import subprocess
import sys

from conftest import ROOT

from workflows.screens import open_screens

COMMAND = """
import sys
from pathlib import Path
from workflows.session import run

def main():
    for number in range(20_000):
        print(number, "\u4f7f", flush=number % 100 == 0)
    Path(sys.argv[1]).write_text("whole")

run(main)
"""


def command(path, where: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command with its output going where a shell says."""
    line = f'{{ "{sys.executable}" -c "$CODE" "{path}"; echo "code $?" >&3; }} {where}'
    return subprocess.run(
        ["bash", "-c", f"exec 3>&1; {line}"],
        cwd=ROOT,
        env={**os.environ, "CODE": COMMAND, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_reader_that_goes_away_ends_no_work(tmp_path):
    done = command(tmp_path / "result", "| head -2 >&2")
    assert done.stdout == "code 0\n"
    assert done.stderr.splitlines()[0] == "0 使"
    assert done.stderr.splitlines()[-1] == (
        "note: nobody reads what this command prints any more; its work goes on"
    )
    assert (tmp_path / "result").read_text() == "whole"


def test_neither_do_both_streams(tmp_path):
    done = command(tmp_path / "result", "2>&1 | true")
    assert (done.stdout, done.stderr) == ("code 0\n", "")
    assert (tmp_path / "result").read_text() == "whole"


def test_streams_that_are_closed(tmp_path):
    done = command(tmp_path / "result", "<&- >&- 2>&-")
    assert (done.stdout, done.stderr) == ("code 0\n", "")
    assert (tmp_path / "result").read_text() == "whole"  # and nothing that was printed


def test_an_encoding_that_lacks_characters(tmp_path):
    done = command(tmp_path / "result", "| head -1 >&2", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.stderr.splitlines()[0] == "0 \\u4f7f"
    assert (tmp_path / "result").read_text() == "whole"


def test_a_terminal_that_goes_away_under_nohup(tmp_path):
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(tmp_path / "result")],
        cwd=ROOT,
        stdout=its,
        stderr=its,
        stdin=its,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    os.close(its)
    os.read(ours, 10)
    os.close(ours)
    assert process.wait(60) == 0
    assert (tmp_path / "result").read_text() == "whole"


def test_children_have_streams_where_the_command_has_none(tmp_path):
    """Else the first file that one opens would be taken for a stream."""
    child = "import os; [os.fstat(number) for number in range(3)]"
    code = f"""
import subprocess, sys
from pathlib import Path
from workflows.session import run
run(lambda: Path(sys.argv[1]).write_text(str(subprocess.call([sys.executable, "-c", {child!r}]))))
"""
    line = f'"{sys.executable}" -c "$CODE" "{tmp_path / "result"}" <&- >&- 2>&-'
    subprocess.run(["bash", "-c", line], cwd=ROOT, env={**os.environ, "CODE": code}, check=True)
    assert (tmp_path / "result").read_text() == "0"


def test_a_screen_is_sent_to_other_processes_as_theirs(monkeypatch):
    """A function of people's own may name one, as in `def score(texts, log=sys.stdout)`."""
    import ray.cloudpickle

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with open_screens():
        sent, copied = ray.cloudpickle.dumps(sys.stdout), copy.copy(sys.stdout)
        assert copied is sys.stdout
        sys.stdout.writelines(["a", "b"])
    assert pickle.loads(sent) is sys.stdout
    assert sys.stdout.getvalue() == "ab"
