"""What was written before rooms were moved stays readable: sweeps, whole and broken off, versions, stores.

tests/data/before_rooms.tar.xz was made by the code before: a finished sweep `before`, the same sweep
`halfway`, whose driver was killed in the second of three trials, their store with version 1 of the model
`tiny`, and an evaluation.
"""

import json
import shutil
import sqlite3
import sys
import tarfile

import pytest
from conftest import ROOT, command, copy_project, finished

from qlora.lora.peft_folder import adapter_base
from tuning.ledger import Ledger
from workflows.sweep.folder import reopen_sweep

pytestmark = pytest.mark.ray
MADE_IN = "/tmp/fix/project"


@pytest.fixture(scope="module")
def before(tmp_path_factory, tiny_base):
    """The files of then in a project of now, with the folders of then taken for those of now."""
    folder = tmp_path_factory.mktemp("before")
    copy_project(folder)
    with tarfile.open(ROOT / "tests/data/before_rooms.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    shutil.copytree(tiny_base, folder / "base")
    kept = [*folder.rglob("*.json"), *folder.rglob("MLmodel")]
    for path in [path for path in kept if "ray" not in path.relative_to(folder).parts]:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(MADE_IN, str(folder)), encoding="utf-8")
    with sqlite3.connect(folder / "mlruns/mlflow.db") as store:
        for table, column in (
            ("experiments", "artifact_location"),
            ("runs", "artifact_uri"),
            ("model_versions", "source"),
            ("model_versions", "storage_location"),
            ("model_version_tags", "value"),
            ("logged_models", "artifact_location"),
            ("tags", "value"),
        ):
            store.execute(f"update {table} set {column} = replace({column}, ?, ?)", (MADE_IN, str(folder)))
    return folder


@pytest.fixture
def summary(before):
    return json.loads((before / "results/before/summary.json").read_text(encoding="utf-8"))


def test_a_finished_sweep_is_told_of(before, summary):
    out = finished(command(before, "tune", "--resume", "before"))
    assert f"best        trial {summary['best']['trial_id']}: public perplexity" in out
    assert "registered  models:/tiny/1, now champion" in out
    assert "#/models/tiny/versions/1" in out
    assert len(Ledger(before / "results/before/trials").records) == 3
    assert reopen_sweep(before / "results/before").sweep_id is None


@pytest.mark.slow
def test_a_version_of_then_is_served_with_its_own_base_and_quantisation(before, summary):
    asked = ["--adapter", "models:/tiny@champion", "--data", "public.json", "--output", "out.json"]
    finished(command(before, "evaluate", *asked))
    found = json.loads((before / "out.json").read_text(encoding="utf-8"))
    assert found["settings"]["quantization"] == "none"
    assert found["mean_perplexity"] == pytest.approx(summary["best"]["public_perplexity"], rel=1e-5)
    out = finished(command(before, "promote", "tiny"))
    assert "champion" in out
    assert adapter_base(before / "results/before/best") == str(before / "base")


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="Ray's state holds byte code of Python 3.11")
def test_a_sweep_that_was_broken_off_goes_on_to_the_end_of_the_undisturbed_one(before, summary):
    """The same trials with the same curves, in the runs that it had.

    To 1e-3 up to step 32. Rounding, which depends on who shares a pass, grows at a rate as large as this: two
    of the trials of then, alike in all but their company, agree to 1e-4 at step 32 and to 3e-2 at step 48.
    """
    ledger = Ledger(before / "results/halfway/trials")
    started = {trial: record.curve for trial, record in ledger.records.items()}
    assert 1 <= len(started) < 3
    out = finished(command(before, "tune", "--resume", "halfway"))
    found = json.loads((before / "results/halfway/summary.json").read_text(encoding="utf-8"))
    assert set(started) <= {trial["trial_id"] for trial in found["trials"]}
    for trial, expected in zip(found["trials"], summary["trials"], strict=True):
        assert trial["config"] == expected["config"]
        steps = {point["step"]: point["public_perplexity"] for point in expected["curve"]}
        common = [point for point in trial["curve"] if point["step"] in steps]
        assert common
        for point in common:
            tolerance = 1e-3 if point["step"] <= 32 else 1e-1
            assert point["public_perplexity"] == pytest.approx(steps[point["step"]], rel=tolerance)
    assert found["best"]["public_perplexity"] == pytest.approx(summary["best"]["public_perplexity"], rel=1e-3)
    assert "champion" in out
    with sqlite3.connect(before / "mlruns/mlflow.db") as store:
        parents = store.execute("select run_uuid, status from runs where name = 'halfway'").fetchall()
        children = store.execute(
            "select count(*) from tags where key = 'mlflow.parentRunId' and value = ?", (parents[0][0],)
        ).fetchone()[0]
    assert [status for _, status in parents] == ["FINISHED"], "it went on in its own run"
    assert children == 3
