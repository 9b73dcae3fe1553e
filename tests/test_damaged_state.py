"""What a disk, a kill or a hand has damaged is told on one line, with exit code 2, and nothing is changed."""

import contextlib
import hashlib
import json
import shutil
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from test_inputs import GOOD, good_space, nothing_heavy_happens, refused  # noqa: F401

import ray_jobs.study
import ray_jobs.tune
from qlora.config import InputError, TrialSettings
from qlora.files import remove_unfinished, write_json
from tracking.address import check_addresses
from tuning.ledger import Ledger, TrialRecord
from workflows.study.settings import load_study
from workflows.study.steps import StudySteps, prepare_study
from workflows.sweep.folder import plan_sweep, reopen_sweep
from workflows.sweep.prepared import read_inputs

POINT = {"step": 1.0, "epoch": 1.0, "public_perplexity": 3.0, "schedule_percent": 50.0, "training_loss": 1.0}
POINT |= {"learning_rate": 1e-3, "tokens_per_second": 9.0, "peak_memory_gib": 0.0}
CONFIG = TrialSettings(learning_rate=1e-3).model_dump(mode="json")
BEST = {"trial_id": "t", "public_perplexity": 3.0, "checkpoint": "best", "model_uri": "models:/tiny/1"}
SUMMARY = {"zero_shot": 4.0, "best": BEST, "champion": {"is_champion": True, "reason": "better"}}
SUMMARIES = {
    "no best": {"best": {}},
    "no champion": {"champion": {}},
    "a perplexity of text": {"zero_shot": "low"},
    "a best of text": {"best": {**BEST, "model_uri": 1}},
}
DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: json.dumps(content).encode()[:-9],
    "zeros": lambda content: bytes(len(json.dumps(content))),
    "not UTF-8": lambda content: b"\xff\xfe" + json.dumps(content).encode(),
    "a list": lambda content: json.dumps([content]).encode(),
    "text": lambda content: json.dumps("content").encode(),
    "deep": lambda content: b'{"a":' * 100_000,
    "another's": lambda content: b"{}",
}
RECORDS = {
    "no trial": {"trial_id": None},
    "a status that is none": {"status": "winning"},
    "a config of nothing": {"config": 3},
    "a rank of text": {"config": {"lora_r": "much"}},
    "a curve of numbers": {"curve": [1, 2]},
    "a point without a step": {"curve": [{"epoch": 1.0}]},
    "a point without its memory": {
        "curve": [{key: value for key, value in POINT.items() if key != "peak_memory_gib"}]
    },
    "a point at no step": {"curve": [{**POINT, "step": float("nan")}]},
    "a config without epochs": {"config": {key: CONFIG[key] for key in CONFIG if key != "epochs"}},
    "an id that leads elsewhere": {"trial_id": "../../other/ray/x"},
    "an id of two lines": {"trial_id": "a\nb"},
    "a point with text": {"curve": [{**POINT, "step": "one"}]},
}
SPACES = {
    "no space": {"space": None},
    "a space of text": {"space": "space"},
    "a key of the space that is none": {"space": {"serach": {}}},
    "digests of text": {"digests": "abc"},
    "no digests": {"digests": None},
    "digests of other things": {"digests": {"train": "a", "public": "b", "prompt": "c", "x": "d"}},
    "an id of a list": {"sweep_id": ["a"]},
    "no file": {"space_file": None},
}


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_HOME", str(tmp_path))
    return tmp_path / "results"


@pytest.fixture
def sweep(results, tiny_base, write_rows) -> Path:
    """The folder of a sweep that has begun, as the code writes it."""
    path = results.parent / "space.yaml"
    path.write_text(yaml.safe_dump(good_space(tiny_base, write_rows)), encoding="utf-8")
    found = plan_sweep(results / "begun", str(path), [])
    inputs = read_inputs(found)
    found.claim(inputs.digests, inputs.prompt_text, inputs.sets)
    Ledger(results / "begun/trials").put(TrialRecord("42_00000", CONFIG, "running", (POINT,)))
    return results / "begun"


@pytest.fixture
def resume(sweep, capsys, monkeypatch):
    """Resume the sweep, which must be refused without a change; returns the line."""

    def run() -> str:
        before = contents(sweep)
        error = refused(ray_jobs.tune, capsys, monkeypatch, "--resume", "begun")
        assert contents(sweep) == before
        return error

    return run


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["sweep.json", "summary.json", "trials/0000-42_00000.json"])
def test_a_damaged_file_of_a_sweep(name, damage, sweep, resume):
    path = sweep / name
    if name == "summary.json":
        write_json(path, SUMMARY)
    path.write_bytes(DAMAGES[damage](json.loads(path.read_text())))
    error = resume()
    assert error.startswith(f"error: {path}: is damaged (")


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_that_is_none(case, sweep, resume):
    path = sweep / "trials/0000-42_00000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **RECORDS[case]}))
    error = resume()
    assert error.startswith(f"error: {path}: is damaged (")
    assert error.endswith("; remove it, and --resume runs this trial anew")


@pytest.mark.parametrize("case", SPACES)
def test_a_sweep_file_that_is_none(case, sweep, resume):
    path = sweep / "sweep.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **SPACES[case]}))
    assert str(path) in resume()


@pytest.mark.parametrize("case", SUMMARIES)
def test_a_summary_that_is_none(case, sweep, resume):
    write_json(sweep / "summary.json", {**SUMMARY, **SUMMARIES[case]})
    assert f"error: {sweep / 'summary.json'}: is damaged (" in resume()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_the_adapter_that_trials_go_on_from(damage, sweep, resume):
    found = reopen_sweep(sweep)
    start = sweep.parent / "adapter"
    start.mkdir()
    (start / "adapter_config.json").write_text("{}")
    begun = replace(found, digests={}, start=("models:/tiny/1", start))
    begun.claim(found.digests, found.prompt_file.read_text(), read_inputs(found).sets)
    reopen_sweep(sweep)
    if damage == "missing":
        shutil.rmtree(sweep / "start")
    else:
        (sweep / "start/adapter_config.json").write_text("{")
    assert "is not what it was; put the adapter models:/tiny/1 there again" in resume()


def test_what_killed_processes_left_half_written_is_removed(sweep):
    """Files and folders, and nothing else: what is there besides stays."""
    whole = contents(sweep)
    (sweep / "trials/.0000-42_00000.json.77.part").write_text("{")
    (sweep / ".best.part/deep").mkdir(parents=True)
    (sweep / ".best.part/deep/.file.part").write_text("")
    (sweep / ".best.part/adapter_config.json").write_text("{}")
    remove_unfinished(sweep)
    assert contents(sweep) == whole
    assert not (sweep / ".best.part").exists()


def test_two_records_of_one_trial(sweep, resume):
    path = sweep / "trials/0000-42_00000.json"
    (sweep / "trials/0001-42_00000.json").write_text(path.read_text())
    assert "0001-42_00000.json" in resume()


def test_a_record_that_is_a_folder(sweep, resume):
    (sweep / "trials/0001-x.json").mkdir()
    assert "is damaged (" in resume()


def test_perplexities_that_are_no_numbers_are_never_best(sweep):
    """A sweep from before may have kept them."""
    bad = [{**POINT, "public_perplexity": value} for value in (float("nan"), float("inf"))]
    record = TrialRecord("42_00001", CONFIG, "finished", tuple(bad))
    Ledger(sweep / "trials").put(record)
    kept = Ledger(sweep / "trials").records["42_00001"]
    assert kept.best is None
    assert asdict(kept)["status"] == "finished"


@pytest.fixture
def study_file(results, tiny_base, write_rows) -> Path:
    """The file of a small study."""
    data = str(write_rows(GOOD, "good.json"))
    content = {
        "base_model": {"name": str(tiny_base), "quantization": "none"},
        "data": {"train": data, "public": data},
        "trial": {"learning_rate": 1e-3},
        "stages": ["1"],
        "shots": 1,
        "num_predictions": 1,
    }
    path = results.parent / "study.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def begun(study_file: Path, folder: Path, *overrides: str) -> str | None:
    """Begin a study in a folder, or go on with it; returns its id."""
    return StudySteps(prepare_study(load_study(str(study_file), list(overrides))), folder, print).claim()


def test_a_study_whose_base_changed_is_refused(results, study_file, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    on_it, folder = f"base_model.name={base}", results / "studies/study"
    first = begun(study_file, folder, on_it)
    assert begun(study_file, folder, on_it) == first
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    with pytest.raises(InputError, match="holds a study with other settings or data"):
        begun(study_file, folder, on_it)


def test_a_study_from_before_a_setting_came_is_gone_on_with(results, study_file):
    folder = results / "studies/study"
    first = begun(study_file, folder)
    path = folder / "study.json"
    kept = json.loads(path.read_text())
    for key in ("loss", "thinking", "max_length"):
        del kept["study"][key]
    del kept["study"]["data"]["format"], kept["study"]["data"]["columns"]
    path.write_text(json.dumps({**kept, "study": {**kept["study"], "prompt": "default"}}))
    assert begun(study_file, folder) == first
    plain = results.parent / "plain.yaml"
    plain.write_text("template: '{instruction}'", encoding="utf-8")
    for other in ("max_length=1024", "trial.learning_rate=0.002", f"prompt={plain}"):
        with pytest.raises(InputError, match="holds a study with other settings or data"):
            begun(study_file, folder, other)


@pytest.fixture
def study(results, study_file, capsys, monkeypatch):
    """Run a study that must be refused without a change; returns the line."""
    folder = results / "studies/study"
    begun(study_file, folder)

    def run() -> str:
        before = contents(folder)
        error = refused(ray_jobs.study, capsys, monkeypatch, "--study", study_file)
        assert contents(folder) == before
        return error

    return run


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["study.json", "steps/train-1.json", "steps/text-zero-shot.json"])
def test_a_damaged_file_of_a_study(name, damage, results, study):
    path = results / "studies/study" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(DAMAGES[damage]({"study_id": "1", "texts": ["a"]}))
    error = study()
    assert error.startswith(f"error: {path}: is damaged (")


def test_a_step_that_lacks_what_it_found(results, study):
    write_json(results / "studies/study/steps/train-1.json", {"seconds": 1.0})
    assert "it lacks what such a step holds" in study()


@pytest.mark.parametrize("value", [float("nan"), "low", None])
def test_a_step_whose_figure_is_none(value, results, study):
    step = {"mean": value, "values": [1.0]}
    write_json(results / "studies/study/steps/perplexity-1.json", step)
    assert "a figure of it is no finite number" in study()


def test_a_trained_adapter_that_is_gone(results, study):
    write_json(results / "studies/study/steps/train-1.json", {"seconds": 1.0, "training_loss": 1.0})
    assert "adapters/1" in study()


@pytest.mark.parametrize("left", ["trials", "zero_shot.json", "ray", "best"])
def test_what_is_left_of_a_sweep_is_no_other_sweeps(left, sweep, tiny_base, write_rows):
    """Its trials would count as those of a sweep on other data."""
    (sweep / "sweep.json").unlink()
    shutil.rmtree(sweep / "trials")
    space = str(sweep.parent.parent / "space.yaml")
    assert plan_sweep(sweep, space, []).name == "begun", "a prompt and public examples are none"
    if left.endswith(".json"):
        (sweep / left).write_text("{}")
    else:
        (sweep / left).mkdir()
    with pytest.raises(InputError, match=f"holds {left} of a sweep whose sweep.json is gone; choose"):
        plan_sweep(sweep, space, [])


def test_what_is_left_of_a_study_is_no_other_studys(results, study):
    folder = results / "studies/study"
    (folder / "study.json").unlink()
    (folder / "steps").mkdir(exist_ok=True)
    (folder / "steps/text-zero-shot.json").write_text("{}")
    assert "holds steps of a study whose study.json is gone; choose another --name" in study()


@pytest.mark.parametrize("damage", ["garbage", "cut"])
def test_a_damaged_store_is_told_before_anything_starts(damage, sweep, resume, tmp_path, monkeypatch):
    file = tmp_path / "mlflow.db"
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE t (x)")
        database.executemany("INSERT INTO t VALUES (?)", [("x" * 100,)] * 1000)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"no database" * 1000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    before = file.read_bytes()
    assert resume().startswith(f"error: {file}: is a damaged database (")
    with pytest.raises(InputError, match="is a damaged database"):
        check_addresses()
    assert file.read_bytes() == before
