"""A home that was moved or copied, whole: its models are where it is now."""

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from qlora.config import InputError
from tracking.address import embedded_store, tracking_uri
from tracking.store import connect, ensure_experiment


@pytest.fixture
def first(tmp_path, monkeypatch) -> Path:
    """A home with one run, which has an artifact, and its model, of which there is a version."""
    client = client_of(tmp_path / "a home", monkeypatch)
    experiment = ensure_experiment(client, "tiny")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/note.txt").write_text("kept")
    run = client.create_run(experiment)
    client.log_artifact(run.info.run_id, str(tmp_path / "files/note.txt"))
    model = client.create_logged_model(experiment, name="adapter", source_run_id=run.info.run_id)
    client.log_model_artifacts(model.model_id, str(tmp_path / "files"))
    client.create_registered_model("tiny")
    client.create_model_version("tiny", f"models:/{model.model_id}", run.info.run_id, model_id=model.model_id)
    return tmp_path / "a home"


def client_of(home: Path, monkeypatch) -> MlflowClient:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # which MLflow has set to the store before
    monkeypatch.setenv("QLORA_HOME", str(home))
    return connect()


def paths_of(client: MlflowClient) -> list[str]:
    experiment = client.get_experiment_by_name("tiny")
    (run,) = client.search_runs([experiment.experiment_id])
    (model,) = client.search_logged_models([experiment.experiment_id])
    (version,) = client.search_model_versions("name = 'tiny'")
    place = client.get_model_version_download_uri("tiny", version.version)
    return [experiment.artifact_location, run.info.artifact_uri, model.artifact_location, place]


@pytest.mark.parametrize("is_copied", [False, True])
def test_artifacts_follow_the_home(is_copied, first, tmp_path, monkeypatch):
    second = tmp_path / "b" / "家 #2"
    second.parent.mkdir()
    (shutil.copytree if is_copied else shutil.move)(first, second)
    client = client_of(second, monkeypatch)
    here = (second / "mlruns" / "artifacts").as_uri()
    assert all(path.startswith(here) for path in paths_of(client)[:3])
    (run,) = client.search_runs([ensure_experiment(client, "tiny")])
    assert Path(client.download_artifacts(run.info.run_id, "note.txt")).read_text() == "kept"
    client.log_text(client.create_run(run.info.experiment_id).info.run_id, "new", "new.txt")
    assert [path.read_text() for path in second.rglob("new.txt")] == ["new"]
    assert first.exists() == is_copied
    if is_copied:
        before = client_of(first, monkeypatch)
        assert all(path.startswith((first / "mlruns/artifacts").as_uri()) for path in paths_of(before)[:3])


def test_a_part_of_the_artifacts_is_no_copy_of_a_home(first, tmp_path, monkeypatch):
    """As where a run was saved beside a copy of the database: what is whole elsewhere stays named."""
    client = client_of(first, monkeypatch)
    (run,) = client.search_runs([ensure_experiment(client, "tiny")])
    part = Path("mlruns/artifacts") / run.info.run_id
    shutil.copytree(first / part, tmp_path / "b" / part)
    shutil.copy(first / "mlruns/mlflow.db", tmp_path / "b/mlruns/mlflow.db")
    assert paths_of(client_of(tmp_path / "b", monkeypatch)) == paths_of(client)


def test_a_home_that_is_reached_by_two_paths_is_not_moved(first, tmp_path, monkeypatch):
    before = paths_of(client_of(first, monkeypatch))
    (tmp_path / "link").symlink_to(first)
    assert paths_of(client_of(tmp_path / "link", monkeypatch)) == before


def test_a_home_that_was_moved_before_it_had_artifacts(tmp_path, monkeypatch):
    client = client_of(tmp_path / "a", monkeypatch)
    client.create_run(ensure_experiment(client, "tiny"))
    shutil.move(tmp_path / "a", tmp_path / "b")
    client = client_of(tmp_path / "b", monkeypatch)
    (run,) = client.search_runs([ensure_experiment(client, "tiny")])
    client.log_text(run.info.run_id, "text", "text.txt")
    assert list((tmp_path / "b").rglob("text.txt")) and not (tmp_path / "a").exists()


def test_artifacts_that_people_keep_elsewhere_stay_there(first, tmp_path, monkeypatch):
    shared = tmp_path / "shared" / "artifacts"
    client = client_of(first, monkeypatch)
    own = client.create_experiment("own", artifact_location=shared.as_uri())
    client.log_text(client.create_run(own).info.run_id, "text", "text.txt")
    shutil.move(first, tmp_path / "b")
    client = client_of(tmp_path / "b", monkeypatch)
    assert client.get_experiment(own).artifact_location == shared.as_uri()
    (run,) = client.search_runs([own])
    assert run.info.artifact_uri.startswith(shared.as_uri())


@pytest.mark.parametrize("name", ["per%cent", "a?b"])
def test_a_home_whose_name_no_store_can_have_is_told(name, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("QLORA_HOME", str(tmp_path / name))
    with pytest.raises(InputError, match="in its name, which the address of an SQLite store can't have"):
        tracking_uri()
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri() == "http://127.0.0.1:5000"


def test_a_home_that_is_a_file_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"^QLORA_HOME: .*/file is a file; name a folder"):
        embedded_store()


def test_a_store_whose_folder_cannot_be_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/x/mlflow.db")
    with pytest.raises(InputError, match="can't be a folder for the tracking store: Not a directory"):
        connect()
