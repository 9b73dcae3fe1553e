"""A sweep taken up again: with Optuna's draws, with a damaged adapter, under its old name, from the adapter
of another sweep, with its checkpoints in an S3-like store.
"""

import itertools
import json
import pickle
import shutil
import sqlite3
from pathlib import Path

import optuna
import pytest
from conftest import Hub, command
from safetensors.torch import load_file, save_file
from servers import object_store
from test_hostile import Payload

from qlora.checkpoint_files import write_manifest

pytestmark = [pytest.mark.ray, pytest.mark.slow]
FEW = ("--set", "num_samples=3", "--set", "search.epochs={choice: [2]}")
RATES = {"uniform": [1e-4, 3e-2]}


def tune(project: Path, *arguments: str, status: int = 0, **environment: str) -> str:
    """Run the command to its end; returns what it printed."""
    process = command(project, "tune", *arguments, env=environment)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == status, out
    return out


def summary(project: Path, name: str) -> dict:
    return json.loads((project / "results" / name / "summary.json").read_text())


def sweep_runs(project: Path) -> dict[str, str]:
    """Status of every run of a sweep itself, by run id."""
    query = (
        "select run_uuid, status from runs join tags using (run_uuid) where key = 'kind' and value = 'sweep'"
    )
    with sqlite3.connect(project / "mlruns/mlflow.db") as store:
        return dict(store.execute(query))


def versions(project: Path) -> int:
    with sqlite3.connect(project / "mlruns/mlflow.db") as store:
        return store.execute("select count(*) from model_versions").fetchone()[0]


def unregistered_copy(project: Path, name: str) -> Path:
    """A copy of the sweep `drawn`, with an id of its own, that was stopped before its registration."""
    folder = project / "results" / name
    shutil.copytree(project / "results/drawn", folder, ignore=shutil.ignore_patterns("summary.json", "best"))
    content = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**content, "sweep": name, "sweep_id": name}))
    return folder


@pytest.fixture(scope="module")
def drawn(project):
    """A finished sweep whose learning rates Optuna draws."""
    rates = f"search.learning_rate={json.dumps(RATES)}"
    tune(
        project,
        "--space",
        "space.yaml",
        "--name",
        "drawn",
        *FEW,
        "--set",
        rates,
        "--set",
        "searcher.type=optuna",
    )
    return summary(project, "drawn")


def test_optuna_draws_the_trials(project, drawn):
    """The learning rates are those that Optuna's own sampler gives with this seed."""
    rates = [trial["config"]["learning_rate"] for trial in drawn["trials"]]
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=42))
    space = {"learning_rate": optuna.distributions.FloatDistribution(*RATES["uniform"])}
    assert sorted(rates) == sorted(study.ask(space).params["learning_rate"] for _ in rates)


def test_an_adapter_that_is_not_what_was_measured_is_not_registered(project, drawn):
    """Its file was damaged after its evaluation; once it is whole again, the sweep ends as it would have."""
    folder = unregistered_copy(project, "damaged")
    trial, file = drawn["best"]["trial_id"], "checkpoint_*/adapter/adapter_model.safetensors"
    paths = [
        path
        for path in (folder / "ray").glob(f"*{trial}*/{file}")
        if json.loads((path.parent.parent / "position.json").read_text())["step"] == drawn_best_step(drawn)
    ]
    (path,) = paths
    whole, before, runs = path.read_bytes(), versions(project), set(sweep_runs(project))
    save_file({name: 3 * tensor for name, tensor in load_file(path).items()}, path)
    write_manifest(path.parent.parent)  # so that it is whole, but not what was measured
    last = tune(project, "--resume", "damaged", status=1).splitlines()[-1]
    assert last.startswith("failed: ")
    assert "when it is loaded back, not the reported" in last
    assert versions(project) == before
    assert not (folder / "summary.json").exists()
    (run,) = set(sweep_runs(project)) - runs
    assert sweep_runs(project)[run] == "FAILED"
    path.write_bytes(whole)
    write_manifest(path.parent.parent)
    tune(project, "--resume", "damaged")
    assert sweep_runs(project)[run] == "FINISHED"
    assert summary(project, "damaged")["best"]["public_perplexity"] == drawn["best"]["public_perplexity"]
    assert versions(project) == before + 1


def steps(checkpoints: Path) -> list[int]:
    found = checkpoints.glob("checkpoint_*/position.json")
    return sorted(json.loads(path.read_text())["step"] for path in found)


def test_a_sweep_without_rays_state_goes_on_from_its_ledger(project, drawn):
    """Ray's state is a stranger's, one trial stood at its first report, another had not begun."""
    folder = unregistered_copy(project, "lost")
    sprung = project / "sprung"
    for path in (folder / "ray").iterdir():
        if path.is_file():
            path.write_bytes(pickle.dumps(Payload(sprung)))
    for name in ("tuner.pkl", "trainable.pkl", "searcher-state-1.pkl", "experiment_state-1.json"):
        (folder / "ray" / name).write_bytes(pickle.dumps(Payload(sprung)))
    first, second, third = sorted((folder / "trials").iterdir())
    third.unlink()
    record = json.loads(second.read_text())
    kept = folder / "ray" / record["trial_id"]
    before, last = steps(kept)
    reached = [point for point in record["curve"] if point["step"] <= before]
    record |= {"status": "running", "curve": reached, "ended_at": None}
    second.write_text(json.dumps(record))
    for path in kept.glob("checkpoint_*"):
        if json.loads((path / "position.json").read_text())["step"] == last:
            shutil.rmtree(path)
    ended = first.read_text()
    tune(project, "--resume", "lost")
    assert first.read_text() == ended, "a trial that had ended is left alone"
    assert not sprung.exists(), "nothing that others can write to is unpickled"
    found = {trial["trial_id"]: trial for trial in summary(project, "lost")["trials"]}
    expected = {trial["trial_id"]: trial for trial in drawn["trials"]}
    assert set(found) == set(expected) == {"42_00000", "42_00001", "42_00002"}
    for name, trial in expected.items():
        assert found[name]["config"] == trial["config"]
        assert [point["step"] for point in found[name]["curve"]] == [
            point["step"] for point in trial["curve"]
        ]
        for one, other in zip(found[name]["curve"], trial["curve"], strict=True):
            assert one["public_perplexity"] == pytest.approx(other["public_perplexity"], rel=1e-5)
    assert steps(kept) == [before, last]


@pytest.mark.parametrize(
    "left",
    [
        pytest.param(True, id="the one before is whole", marks=pytest.mark.slow),
        pytest.param(False, id="none is whole", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(project, drawn, left):
    """The trial goes on from the one before, or from its start, to the same curve."""
    name = f"damaged-{left}"
    folder = unregistered_copy(project, name)
    (path,) = (folder / "trials").glob("*42_00001*")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "status": "running", "ended_at": None}))
    newest_first = sorted((folder / "ray/42_00001").glob("checkpoint_*"), reverse=True)
    for checkpoint in newest_first[:1] if left else newest_first:
        (checkpoint / "adapter/adapter_model.safetensors").write_bytes(b"cut")
    out = tune(project, "--resume", name)
    last = record["curve"][-1]["step"]
    assert f"note        trial 42_00001: the checkpoint of step {last:.0f} is damaged and passed over" in out
    assert f"step {last:.0f} is damaged and passed over" in "".join(summary(project, name)["host_notes"])
    assert f"step {last:.0f} is damaged and passed over" in (folder / "report.html").read_text()
    again = json.loads(path.read_text())["curve"]
    assert [point["public_perplexity"] for point in again] == pytest.approx(
        [point["public_perplexity"] for point in record["curve"]], rel=1e-5
    )


def test_a_damaged_best_checkpoint_is_trained_again(project, drawn):
    """It is verified before it is copied; the trial is set back, and the sweep goes on when it is resumed."""
    folder = unregistered_copy(project, "cut-best")
    trial = drawn["best"]["trial_id"]
    for path in (folder / "ray" / trial).glob("checkpoint_*"):
        if json.loads((path / "position.json").read_text())["step"] == drawn_best_step(drawn):
            (path / "adapter/adapter_model.safetensors").write_bytes(b"cut")
    last = tune(project, "--resume", "cut-best", status=3).splitlines()[-1]
    assert last.startswith("stopped: ") and "adapter_model.safetensors is missing or damaged" in last
    assert last.endswith("python ray_jobs/tune.py --resume cut-best")
    tune(project, "--resume", "cut-best")
    found = summary(project, "cut-best")["best"]
    assert found["trial_id"] == trial
    assert found["public_perplexity"] == pytest.approx(drawn["best"]["public_perplexity"], rel=1e-5)


FEARLESS = (
    "trial={batch_size: 4, lora_r: 4, lora_dropout: 0.0, learning_rate: 1.0e-3, max_grad_norm: 1.0e+30}"
)


def alphas(*values: float) -> tuple[str, ...]:
    """Options of a sweep over these values of lora_alpha, without a limit to a gradient."""
    search = f"search={{lora_alpha: {{grid_search: {list(values)}}}, epochs: {{choice: [2]}}}}"
    changes = ("num_samples=1", "scheduler={type: fifo}", FEARLESS, search)
    return tuple(itertools.chain.from_iterable(("--set", change) for change in changes))


def test_trials_that_diverge_are_tried_once_and_never_best(project):
    """One of a grid's two scales of an adapter is beyond hope; then both are."""
    before = versions(project) if (project / "mlruns/mlflow.db").exists() else 0
    out = tune(project, "--space", "space.yaml", "--name", "half", *alphas(8, 1e30))
    assert "Traceback" not in out
    found = {trial["config"]["lora_alpha"]: trial for trial in summary(project, "half")["trials"]}
    assert found[8]["status"] == "finished"
    assert found[1e30]["status"] == "diverged"
    assert found[1e30]["error"].startswith("diverged at step ")
    assert summary(project, "half")["best"]["trial_id"] == found[8]["trial_id"]
    assert "diverged" in (project / "results/half/report.html").read_text()
    assert versions(project) == before + 1
    hopeless = ("--space", "space.yaml", "--name", "none", *alphas(1e29, 1e30))
    for again in (hopeless, ("--resume", "none")):
        out = tune(project, *again, status=1)
        assert "Traceback" not in out
        assert out.splitlines()[-1].startswith("failed: all 2 trials diverged: diverged at step ")
        assert out.splitlines()[-1].endswith("; nothing is registered")
    assert versions(project) == before + 1


def drawn_best_step(drawn: dict) -> int:
    (curve,) = (trial["curve"] for trial in drawn["trials"] if trial["trial_id"] == drawn["best"]["trial_id"])
    return min(curve, key=lambda point: point["public_perplexity"])["step"]


def test_trials_go_on_from_another_sweeps_adapter(project, drawn):
    """Trials that learn next to nothing end where that adapter stood."""
    idle = ("--set", "search.learning_rate={choice: [1.0e-9]}", "--set", "num_samples=1")
    start = drawn["best"]["model_uri"]
    tune(project, "--space", "space.yaml", "--name", "on", *FEW, *idle, "--continue-from", start)
    found = summary(project, "on")
    assert found["zero_shot"] == drawn["zero_shot"]
    assert found["best"]["public_perplexity"] == pytest.approx(drawn["best"]["public_perplexity"], rel=1e-3)
    assert found["best"]["public_perplexity"] < 0.99 * found["zero_shot"]
    with sqlite3.connect(project / "mlruns/mlflow.db") as store:
        query = "select value from model_version_tags where key = 'continued_from'"
        assert store.execute(query).fetchall() == [(start,)]


def test_a_sweep_under_an_old_name_has_runs_of_its_own(project, drawn):
    old = sweep_runs(project)
    shutil.rmtree(project / "results/drawn")
    tune(project, "--space", "space.yaml", "--name", "drawn", *FEW)
    new = summary(project, "drawn")
    assert new["mlflow_run_id"] not in old
    assert {trial["mlflow_run_id"] for trial in new["trials"]}.isdisjoint(
        trial["mlflow_run_id"] for trial in drawn["trials"]
    )
    assert {run: status for run, status in sweep_runs(project).items() if run in old} == old


@pytest.mark.parametrize("told_by", ["environment", "uri"])
def test_checkpoints_may_be_in_an_object_store(project, told_by):
    with object_store("checkpoints") as environment:
        storage = "storage=s3://checkpoints/sweeps"
        if told_by == "uri":
            endpoint = environment.pop("AWS_ENDPOINT_URL").removeprefix("http://")
            storage += f"?endpoint_override={endpoint}&scheme=http"
        name = f"away-{told_by}"
        tune(project, "--space", "space.yaml", "--name", name, *FEW, "--set", storage, **environment)
    found = summary(project, name)
    assert len(found["trials"]) == 3
    assert not (project / "results" / name / "ray").exists()
    assert (project / "results" / name / "best/adapter_model.safetensors").exists()


def test_a_hub_base_stays_at_the_commit_that_a_sweep_began_with(project, tiny_base, tmp_path):
    """The hub's main branch moves on between two commands, to what is no model."""
    broken = shutil.copytree(tiny_base, tmp_path / "broken")
    (broken / "config.json").write_text("{}")
    hub = Hub(tmp_path / "hub", tiny_base, broken)
    environment, first = {"HF_HUB_CACHE": str(hub.folder)}, f"team/tiny@{hub.commits[0]}"
    on_hub = (*FEW, "--set", "base_model.name=team/tiny", "--set", "registered_model=hub")
    tune(project, "--space", "space.yaml", "--name", "hub", *on_hub, **environment)
    before, folder = summary(project, "hub"), project / "results/hub"
    assert json.loads((folder / "sweep.json").read_text())["space"]["base_model"]["name"] == first
    hub.move_to(1)
    (folder / "summary.json").unlink()
    tune(project, "--resume", "hub", **environment)
    assert summary(project, "hub")["best"] == before["best"]
    dry = ("--space", "space.yaml", *on_hub, "--dry-run")
    assert first in tune(project, *dry, "--continue-from", "models:/hub@champion", **environment)
    assert "error: team/tiny: " in tune(project, *dry, status=2, **environment)
