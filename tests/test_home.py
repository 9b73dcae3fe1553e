"""The home: a folder, or a URI whose results are worked on in a copy. Here the URI is of this machine."""

import json
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from qlora.config import InputError
from qlora.files import write_json, write_text
from qlora.home import PROJECT_ROOT, home, home_folder, in_results
from tracking.address import artifacts_folder, sqlite_file, tracking_uri
from workflows import mirror as mirrors
from workflows import stopping
from workflows.kept_results import remove
from workflows.lock import lost_place
from workflows.mirror import Mirror
from workflows.results import open_output, open_results, output_folder
from workflows.session import StoppedError
from workflows.sweep.folder import reopen_sweep

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr("workflows.lock._SETTLING_SECONDS", 0.01)
    monkeypatch.setattr("workflows.lock._RENEWAL_SECONDS", 0.05)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The folder of a home at a URI."""
    monkeypatch.setenv("QLORA_HOME", (tmp_path / "home").as_uri())
    monkeypatch.setenv("TMPDIR", str(tmp_path / "copies"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "copies").mkdir()
    return tmp_path / "home"


def test_without_a_name_the_home_is_the_projects_folder(monkeypatch):
    monkeypatch.delenv("QLORA_HOME", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert home_folder() == PROJECT_ROOT
    assert in_results("quickstart", "best") == "results/quickstart/best"
    assert tracking_uri() == f"sqlite:///{PROJECT_ROOT}/mlruns/mlflow.db"


def test_results_and_the_embedded_store_are_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert in_results("quickstart") == f"{tmp_path}/results/quickstart"
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    assert artifacts_folder() == tmp_path / "mlruns/artifacts"
    with open_results("quickstart") as results, results.held():
        write_text(results.path / "sweep.json", "{}")
    assert (tmp_path / "results/quickstart/sweep.json").read_text() == "{}"


def test_artifacts_lie_beside_a_store_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/team/mlflow.db")
    assert artifacts_folder() == tmp_path / "team/artifacts"


@pytest.mark.parametrize(
    ("named", "problem"), [("", "is not set"), ("here", "must be an absolute path"), ("~x/y", "must be an")]
)
def test_a_job_has_to_name_its_home(named, problem, monkeypatch):
    monkeypatch.setenv(JOB, "{}")
    monkeypatch.setenv("QLORA_HOME", named)
    with pytest.raises(InputError, match=f"^QLORA_HOME: {problem}.*: a job's own folder is lost with it"):
        home()


@pytest.mark.parametrize("named", ["/data/home", "s3://bucket/path", "~/home"])
def test_a_job_with_a_home_has_it(named, monkeypatch):
    monkeypatch.setenv(JOB, "{}")
    monkeypatch.setenv("QLORA_HOME", named)
    assert home() == named.replace("~", str(Path.home()))


def test_a_home_at_a_uri_holds_no_embedded_store(place, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=r"^MLFLOW_TRACKING_URI: must name a server: the home file:///"):
        tracking_uri()


def test_a_home_with_a_key_in_its_address_is_refused(monkeypatch):
    monkeypatch.setenv("QLORA_HOME", "s3://key:secret@bucket/path")
    with pytest.raises(InputError, match=r"^QLORA_HOME: holds a name") as refused, open_results("any"):
        pass
    assert "secret" not in str(refused.value)


def test_a_home_that_cannot_be_reached_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("QLORA_HOME", "nowhere://bucket/path")
    words = r"^nowhere://bucket/path/results/any: can't be reached \("
    with pytest.raises(InputError, match=words), open_results("any"):
        pass


def test_what_is_written_goes_to_the_home_and_is_found_by_the_next(place, tmp_path):
    with open_results("quick") as results, results.held():
        write_text(results.path / "trials/0000-a.json", "one")
        (results.path / "ray/a").mkdir(parents=True)
        (results.path / "ray/a/state").write_text("Ray's own")
    there = place / "results/quick"
    assert [path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()] == [
        "trials/0000-a.json"
    ]
    assert not list((tmp_path / "copies").iterdir()), "the copy is gone"
    with open_results("quick") as results:
        assert (results.path / "trials/0000-a.json").read_text() == "one"
    with open_results("quick", only=("sweep.json",)) as results:
        assert not (results.path / "trials").exists()


def test_what_is_written_is_there_while_work_goes_on(place, monkeypatch):
    monkeypatch.setattr(mirrors, "_SECONDS", 0.01)
    with open_results("quick") as results, results.held():
        for text in ("one", "another"):
            write_text(results.path / "sweep.json", text)
            wait_for(lambda text=text: (place / "results/quick/sweep.json").read_text() == text)
            assert [path.name for path in (place / "results/quick").glob("*.json")] == ["sweep.json"]


def test_one_process_at_a_time_holds_a_folder_of_the_home(place, monkeypatch):
    with open_results("quick") as mine, open_results("quick") as other, mine.held():
        refused = pytest.raises(InputError, match="being worked on")
        with refused, other.held():
            pass


def test_what_another_process_wrote_just_before_is_seen_by_who_holds_it(place, monkeypatch):
    with open_results("quick") as late:
        with open_results("quick") as early, early.held():
            write_text(early.path / "summary.json", "done")
        assert not (late.path / "summary.json").exists()
        with late.held():
            assert (late.path / "summary.json").read_text() == "done"


def test_a_file_that_says_that_others_are_whole_goes_after_them(tmp_path, monkeypatch):
    sent, here = [], tmp_path / "here"
    for name in ("summary.json", "sweep.json", "best/adapter.bin", "zero_shot.json"):
        write_json(here / name, {})
    mirror = Mirror((tmp_path / "there").as_uri(), here)
    monkeypatch.setattr(mirror, "_write", lambda name, content: sent.append(name))
    mirror.send()
    assert set(sent[:2]) == {"best/adapter.bin", "zero_shot.json"}
    assert sent[2:] == ["sweep.json", "summary.json"]


def test_a_kill_while_things_are_sent_leaves_no_mark_that_all_are_there(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for name in ("summary.json", "trials/0.json", "trials/1.json"):
        write_json(here / name, {})
    for survivors in range(3):
        mirror = Mirror((there / str(survivors)).as_uri(), here)
        write, left = mirror._write, [survivors]

        def write_some(name, content, write=write, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            write(name, content)

        monkeypatch.setattr(mirror, "_write", write_some)
        with pytest.raises(KeyboardInterrupt):
            mirror.send()
        assert not (there / str(survivors) / "summary.json").exists()


def test_a_place_that_takes_nothing_is_told_at_the_end_and_nothing_is_lost(place, tmp_path, monkeypatch):

    def work() -> None:
        with open_results("quick") as results, results.held():
            (place / "results/quick/trials").write_text("a file in the way of a folder")
            write_text(results.path / "trials/0.json", "one")

    with pytest.raises(StoppedError, match=r"can't be written to .*; what it lacks is in") as stopped:
        work()
    copy = Path(str(stopped.value).rpartition(" is in ")[2])
    assert (copy / "trials/0.json").read_text() == "one"


def test_nothing_is_sent_once_the_place_is_another_process_s(tmp_path):
    mine = [True]
    mirror = Mirror((tmp_path / "there").as_uri(), tmp_path / "here", may_write=lambda: mine[0])

    def work() -> None:
        with mirror.kept():
            write_text(tmp_path / "here/a", "one")
            wait_for((tmp_path / "there/a").exists)
            mine[0] = False
            write_text(tmp_path / "here/a", "another")

    with pytest.raises(StoppedError, match="another process may have taken it"):
        work()
    assert (tmp_path / "there/a").read_text() == "one"


def test_what_is_gone_here_goes_there_where_that_is_asked(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    (there / "out.json.bak").write_text("of another")
    mirror = Mirror(there.as_uri(), here, names=("out.json", ".out.json.work"), removes=True)
    with mirror.kept():
        write_text(here / ".out.json.work/journal.jsonl", "rows")
        write_text(here / ".out.json.work/lock", "")
        wait_for((there / ".out.json.work/journal.jsonl").exists)
        write_json(here / "out.json", [1])
        (here / ".out.json.work").rename(here / ".out.json.1.part")
    assert sorted(path.name for path in there.iterdir()) == ["out.json", "out.json.bak"]
    assert json.loads((there / "out.json").read_text()) == [1]


def wait_for(condition) -> None:
    pause = threading.Event()
    for _ in range(500):
        with suppress(FileNotFoundError):  # it has not come yet
            if condition():
                return
        pause.wait(0.02)
    raise AssertionError("it did not come")


def test_an_output_at_a_uri_is_kept_there_with_what_lies_beside_it(tmp_path, monkeypatch):
    there = tmp_path / "there"
    place = f"{there.as_uri()}/out.jsonl"
    with open_output(place, ()) as output:
        assert (output.path.name, output.place) == ("out.jsonl", place)
        write_text(output.path.with_name(".out.jsonl.work") / "journal.jsonl", "rows")
    assert (there / ".out.jsonl.work/journal.jsonl").read_text() == "rows"
    with open_output(place, ()) as output:
        work = output.path.with_name(".out.jsonl.work")
        assert (work / "journal.jsonl").read_text() == "rows", "the job goes on from there"
        write_text(output.path, "all")
        work.rename(work.with_name(".out.jsonl.1.part"))
    assert [path.name for path in there.iterdir()] == ["out.jsonl"]


def test_an_output_is_at_its_uri_before_anyone_is_told_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "_SECONDS", 0.05)
    there = tmp_path / "there"
    with open_output(f"{there.as_uri()}/out.jsonl", ()) as output:
        write_text(output.path, "all")
        output.settle()
        assert (there / "out.jsonl").read_text() == "all"
        (there / "out.jsonl").unlink()
        (there / "out.jsonl").mkdir()
        write_text(output.path, "more")
        with pytest.raises(StoppedError, match=r"^\S+ can't be written to \("):
            output.settle()
        (there / "out.jsonl").rmdir()


def test_one_job_at_a_time_writes_an_output_at_a_uri(tmp_path, monkeypatch):
    place = f"{tmp_path.as_uri()}/out.json"
    refused = pytest.raises(InputError, match="being worked on")
    with open_output(place, ()), refused, open_output(place, ()):
        pass
    with open_output(place, ()), open_output(f"{tmp_path.as_uri()}/other.json", ()):
        pass
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_a_jobs_relative_output_is_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_HOME", str(tmp_path))
    with open_output("out.json", ()) as output:
        assert output.path == Path("out.json")
    monkeypatch.setenv(JOB, "{}")
    with open_output("results/out.json", ()) as output:
        assert output.path == tmp_path / "results/out.json"
    with open_output("/elsewhere/out.json", ()) as output:
        assert output.path == Path("/elsewhere/out.json")
    monkeypatch.delenv("QLORA_HOME")
    refused = pytest.raises(InputError, match=r"^QLORA_HOME: is not set")
    with refused, open_output("out.json", ()):
        pass


def test_an_exports_folder_is_on_a_disk(tmp_path, monkeypatch):
    assert output_folder("exports/wide") == Path("exports/wide")
    refused = pytest.raises(InputError, match=r"^--output: s3://bucket/wide is no folder of a disk")
    with refused:
        output_folder("s3://bucket/wide")
    monkeypatch.setenv(JOB, "{}")
    monkeypatch.setenv("QLORA_HOME", str(tmp_path))
    assert output_folder("exports/wide") == tmp_path / "exports/wide"
    monkeypatch.setenv("QLORA_HOME", "s3://bucket")
    with refused:
        output_folder("wide")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("s3://a:b@bucket/out.json", "--output: holds a name"),
        ("file:///in.json", "is the input too"),
        ("s3://bucket", "s3://bucket: names no file"),
        ("s3://bucket/folder/", "folder/: names no file"),
    ],
)
def test_an_output_at_a_uri_that_cannot_be_is_refused(name, problem):
    with pytest.raises(InputError, match=problem), open_output(name, ["file:///in.json"]):
        pass


def killed_in(mirror: Mirror, moment: str, monkeypatch) -> None:
    """Let a signal come while the thread that sends stands in a method."""
    method, main = getattr(mirror, moment), threading.main_thread()

    def slow(*arguments):
        if threading.current_thread() is not main and mirror._ended.is_set():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.1)
        return method(*arguments)

    monkeypatch.setattr(mirror, moment, slow)


@pytest.mark.parametrize("moment", ["_send_one", "_remove", "_changed"])
def test_a_signal_in_the_last_moment_breaks_nothing_off(moment, tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "_SECONDS", 0.05)
    monkeypatch.setattr(stopping, "_received", [])
    before = [signal.signal(number, signal.default_int_handler) for number in stopping._SIGNALS]
    stopping.catch_signals()
    here, there = tmp_path / "here", tmp_path / "there"
    mirror = Mirror(there.as_uri(), here, names=("out.json", ".out.json.work"), removes=True)
    killed_in(mirror, moment, monkeypatch)

    def work() -> None:
        with mirror.kept():
            write_text(here / ".out.json.work/journal.jsonl", "rows")
            wait_for((there / ".out.json.work/journal.jsonl").exists)
            write_text(here / "out.json", "all")
            (here / ".out.json.work").rename(here / ".out.json.1.part")

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        for number, handler in zip(stopping._SIGNALS, before, strict=True):
            signal.signal(number, handler)
    assert not mirror.has_unsent
    assert [path.name for path in there.iterdir()] == ["out.json"]
    assert (there / "out.json").read_text() == "all"


def test_what_is_gone_goes_only_once_what_took_its_place_is_there(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    mirror = Mirror(there.as_uri(), here, names=("out.json", ".out.json.work"), removes=True)
    write_text(here / ".out.json.work/journal.jsonl", "rows")
    mirror.send()
    send = mirror._send_one

    def while_it_is_sent(name, stamp):
        send(name, stamp)
        write_text(here / "out.json", "all")
        (here / ".out.json.work").rename(here / ".out.json.1.part")

    monkeypatch.setattr(mirror, "_send_one", while_it_is_sent)
    write_text(here / ".out.json.work/journal.jsonl", "more rows")
    mirror.send()
    assert (there / ".out.json.work/journal.jsonl").read_text() == "more rows"
    monkeypatch.setattr(mirror, "_send_one", send)
    mirror.send()
    assert [path.name for path in there.iterdir()] == ["out.json"]


def test_a_file_that_could_not_be_sent_whole_stays_as_it_was(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    mirror = Mirror(there.as_uri(), here)
    write_text(here / "a", "one")
    mirror.send()
    write_text(here / "a", "another")

    def cut(source, target, length):
        target.write(source.read(2))
        raise OSError("the line is cut")

    monkeypatch.setattr(mirrors.shutil, "copyfileobj", cut)
    with pytest.raises(OSError, match="the line is cut"):
        mirror.send()
    assert (there / "a").read_text() == "one"


def test_whatever_a_stores_library_raises_is_told_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "_SECONDS", 0.02)
    mirror, tried = Mirror((tmp_path / "there").as_uri(), tmp_path / "here"), threading.Event()

    def refuse(name, content):
        tried.set()
        raise RuntimeError("no such credentials")

    monkeypatch.setattr(mirror, "_write", refuse)

    def work() -> None:
        with mirror.kept():
            write_text(tmp_path / "here/a", "one")
            assert tried.wait(20)

    with pytest.raises(StoppedError, match=r"written to \(no such credentials\); what it lacks is in"):
        work()
    assert mirror.has_unsent


def test_what_was_removed_from_the_home_meanwhile_is_not_gone_on_with(place):
    with open_results("quick") as results, results.held():
        write_json(results.path / "sweep.json", {})
        write_text(results.path / "trials/0.json", "one")
    with open_results("quick") as late:
        remove("quick")
        with late.held():
            assert not list(late.path.glob("*.json"))
            write_text(late.path / "trials/1.json", "another")
    assert [path.name for path in (place / "results/quick").rglob("*") if path.is_file()] == ["1.json"]


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_sweep_is_removed_with_a_word_on_what_may_be_left(content, place):
    write_text(place / "results/cut/sweep.json", content)
    assert remove("cut") == (
        "sweep.json is damaged: checkpoints that the sweep kept in a storage of its own are there"
    )
    assert not (place / "results/cut").exists()


def test_the_lease_that_another_took_and_gave_back_is_lost(place, monkeypatch):
    def work() -> None:
        with open_results("quick") as results, results.held():
            write_text(results.path / "a", "mine")
            wait_for((place / "results/quick/a").exists)
            (place / "results/quick/a").write_text("another's")

            def noticed() -> bool:
                (place / "results/quick/lease").unlink(missing_ok=True)  # again if it was just being renewed
                return lost_place() is not None

            wait_for(noticed)
            write_text(results.path / "a", "mine, later")

    with pytest.raises(StoppedError, match="another process may have taken it"):
        work()
    assert (place / "results/quick/a").read_text() == "another's"


def test_errors_name_the_homes_files_and_not_the_copys(place):
    with open_results("quick") as results, results.held():
        write_text(results.path / "sweep.json", "{")
    words = re.escape(f"{place.as_uri()}/results/quick/sweep.json: is damaged")
    with pytest.raises(InputError, match=f"^{words}"), open_results("quick") as results:
        reopen_sweep(results.path)


@pytest.mark.parametrize("name", ["ray", "lock", "lease", "run1"])
def test_an_output_of_any_name_is_sent_and_no_other_is_touched(name, tmp_path):
    there = tmp_path / "there"
    for other in ("run10", ".run10.work", "run1-data"):
        write_text(there / f"{other}/x" if other != "run10" else there / other, "of another")
    with open_output(f"{there.as_uri()}/{name}", ()) as output:
        assert not list(output.path.parent.glob("*"))
        write_text(output.path, "all")
    assert (there / name).read_text() == "all"
    assert {path.name for path in there.iterdir()} == {"run10", ".run10.work", "run1-data", name}


def test_stores_of_sqlite_are_told_by_their_files():
    assert sqlite_file("sqlite:///mlruns/mlflow.db") == Path("mlruns/mlflow.db")
    assert sqlite_file("sqlite:////data/mlflow.db?timeout=9") == Path("/data/mlflow.db")
    assert sqlite_file("sqlite+pysqlite:///mlflow.db") == Path("mlflow.db")
    for uri in ("sqlite://", "sqlite:///file:/x/b.db?uri=true", "http://127.0.0.1:5000"):
        assert sqlite_file(uri) is None


def test_a_copied_sweep_is_told_from_one_that_was_renamed(tmp_path):
    """Its trials would be logged to the runs of the sweep that it was copied from."""
    content = {"sweep": "first", "sweep_id": "1", "space_file": "a", "digests": {"train": "x"}, "space": {}}
    for name in ("first", "second"):
        write_json(tmp_path / name / "sweep.json", content)
    with pytest.raises(InputError, match=r"second: is a copy of the sweep 'first'; go on with that \(--res"):
        reopen_sweep(tmp_path / "second")
    (tmp_path / "link").symlink_to(tmp_path / "first")
    of_no_space = pytest.raises(InputError, match=r"sweep\.json")  # another reason, behind this one
    with of_no_space:
        reopen_sweep(tmp_path / "link")
    for name in ("first", "second"):  # from before sweeps had ids: they may be two
        write_json(tmp_path / name / "sweep.json", content | {"sweep_id": None})
    with of_no_space:
        reopen_sweep(tmp_path / "second")
    write_json(tmp_path / "second" / "sweep.json", content)
    (tmp_path / "first/sweep.json").unlink()
    with of_no_space:
        reopen_sweep(tmp_path / "second")


def test_an_output_in_the_users_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with open_output("~/out.json", []) as output:
        assert output.path == tmp_path / "out.json"


def test_an_output_that_is_a_link_is_what_it_leads_to(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "there" / "out.json")
    with open_output(str(tmp_path / "link.json"), []) as output:
        assert output.path == tmp_path / "there" / "out.json"
        write_text(output.path, "new")
    assert (tmp_path / "link.json").read_text() == "new" and (tmp_path / "link.json").is_symlink()
