"""The commands that `make chaos` kills, the projects that they start from, and what they must have left."""

import compileall
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from conftest import WORDS, byte_tokenizer, copy_project, tiny_model, write_course

from qlora.failpoints import VARIABLE

_USE_STORE = ("tune", "study", "roll_back", "promote")
_TIMING = {"seconds", "rows_per_second", "seconds_generating", "rows_per_second_generating", "host_seconds"}
_TIMING |= {"seconds_to_first_row", "peak_memory_gib", "versions", "tokens_per_second", "rows_generated"}
_TIMING |= {"tokens", "engine", "workers", "asks_another_question"}


@dataclass(frozen=True)
class Scenario:
    """A command, and what goes on with it after a kill.

    outcome: what it must have left, as JSON. needs: commands that are done before.
    """

    name: str
    command: tuple[str, ...]
    again: tuple[str, ...]
    outcome: Callable[[Path], Any]
    needs: tuple[tuple[str, ...], ...] = ()


def run(project: Path, command: tuple[str, ...], failpoints: Path) -> int:
    """Run a command of a project to its end, with a folder for failpoints; returns its exit code."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(project), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "MLFLOW_TRACKING_URI": "",
        "CUDA_VISIBLE_DEVICES": "",
        VARIABLE: str(failpoints),
    }
    with open(project / "out.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, f"ray_jobs/{command[0]}.py", *command[1:]],
            cwd=project,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            return process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return 124


def fresh(scenario: Scenario, lane: Path) -> Path:
    """Make a project like the one that the scenario starts from."""
    project = lane / "run"
    shutil.rmtree(project, ignore_errors=True)
    shutil.copytree(lane / f"{scenario.name}.start", project)
    return project


def make_project(lane: Path, scenario: Scenario) -> None:
    """Make the project that a scenario starts from: a tiny base, data, spaces, and what it needs done before.

    It is made at the path where it will run, unless it is there already.
    """
    start, project = lane / f"{scenario.name}.start", lane / "run"
    if start.exists():
        return
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir(parents=True)
    copy_project(project)
    tiny_model("llama").save_pretrained(project / "base")
    byte_tokenizer().save_pretrained(project / "base")
    write_course(project)
    asked = [{"id": f"r{n}", "instruction": f"翻譯：{WORDS[n % 16]}" * (1 + n % 3)} for n in range(40)]
    asked[7]["instruction"] = "長" * 5000
    (project / "rows.json").write_text(json.dumps(asked), encoding="utf-8")
    base = {"name": str(project / "base"), "quantization": "none"}
    data = {"train": "train.json", "public": "public.json"}
    trial = {"batch_size": 4, "lora_r": 4, "lora_dropout": 0.0}
    space = {
        "base_model": base,
        "data": data,
        "trial": trial,
        "search": {"learning_rate": {"grid_search": [1e-2, 1e-3]}, "epochs": {"choice": [3]}},
        "num_samples": 1,
        "registered_model": "tiny",
        "scheduler": {"type": "fifo"},
        "resources_per_trial": {"cpu": 1},
    }
    (project / "space.yaml").write_text(yaml.safe_dump(space), encoding="utf-8")
    study = {
        "base_model": base,
        "data": data,
        "trial": {**trial, "learning_rate": 1e-2},
        "stages": ["1+1"],
        "beams": [1, 2],
        "shots": 1,
        "max_new_tokens": 4,
        "num_predictions": 2,
    }
    (project / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    compileall.compile_dir(project, quiet=2)
    if scenario.name in _USE_STORE:  # a store's schema is MLflow's to make; it takes seconds
        script = "from tracking.store import connect; connect()"
        environment = {**os.environ, "MLFLOW_TRACKING_URI": ""}
        subprocess.run([sys.executable, "-c", script], cwd=project, env=environment, check=True)
    for command in scenario.needs:
        code = run(project, command, project / "failpoints")
        assert code in (0, 4), f"{command} failed; see {project}/out.log"
    shutil.rmtree(project / "failpoints", ignore_errors=True)
    (project / "out.log").unlink(missing_ok=True)
    project.rename(start)


def tune_outcome(project: Path) -> Any:
    """Return what a sweep must have left: results, store, files."""
    summary = json.loads((project / "results/sweep/summary.json").read_text(encoding="utf-8"))
    trials = sorted(summary["trials"], key=lambda trial: trial["trial_id"])
    return {
        "trials": [
            {
                "id": trial["trial_id"],
                "config": trial["config"],
                "status": trial["status"],
                "curve": [[point["step"], _rounded(point["public_perplexity"])] for point in trial["curve"]],
            }
            for trial in trials
        ],
        "zero_shot": _rounded(summary["zero_shot"]),
        "best": [summary["best"]["trial_id"], _rounded(summary["best"]["public_perplexity"])],
        "champion": summary["champion"],
        "store": store_outcome(project),
        "left over": left_over(project),
        "adapter": (project / "results/sweep/best/adapter_model.safetensors").exists(),
    }


def store_outcome(project: Path) -> Any:
    """Return the runs, figures, versions and models of the store, without ids and times."""
    with sqlite3.connect(project / "mlruns/mlflow.db") as store:

        def rows(query: str) -> list[Any]:
            return sorted(map(list, store.execute(query).fetchall()))

        return {
            "runs": rows("select name, status, count(*) from runs group by 1, 2"),
            "points": rows(
                "select name, key, step, count(*) from metrics join runs using (run_uuid) "
                "where key in ('public_perplexity', 'epoch_public_perplexity', 'training_loss') "
                "group by 1, 2, 3"
            ),
            "versions": rows("select name, version, status, description from model_versions"),
            "aliases": rows("select name, alias, version from registered_model_aliases"),
            "history": rows("select name, key, value from registered_model_tags"),
            "models": rows(
                "select name, status, count(*) from logged_models where lifecycle_stage = 'active' "
                "group by 1, 2"
            ),
            "linked": rows(
                "select tag_key, count(*) from logged_model_tags join logged_models using (model_id) "
                "where lifecycle_stage = 'active' group by 1"
            ),
        }


def batch_outcome(project: Path) -> Any:
    """Return what a batch job must have left: three files, and nothing beside them."""
    out = project / "out"
    meta = json.loads((out / "outputs.json.meta.json").read_text(encoding="utf-8"))
    return {
        "outputs": hashlib.sha256((out / "outputs.json").read_bytes()).hexdigest(),
        "errors": json.loads((out / "outputs.json.errors.json").read_text(encoding="utf-8")),
        "meta": _without_timing(meta),
        "files": sorted(path.name for path in out.iterdir()),
        "left over": left_over(project),
    }


def registry_outcome(project: Path) -> Any:
    """Return what the registry must hold."""
    found = store_outcome(project)
    return {key: found[key] for key in ("versions", "aliases", "history", "models")}


def study_outcome(project: Path) -> Any:
    """Return what a study must have left."""
    folder = project / "results/studies/study"
    steps = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "steps").iterdir()}
    return {
        "steps": {name: _without_timing(step) for name, step in sorted(steps.items())},
        "page": (folder / "study.html").exists(),
        "store": store_outcome(project),
        "left over": left_over(project),
    }


def left_over(project: Path) -> list[str]:
    """List files that no finished work leaves."""
    found = [*project.rglob("*.part"), *project.rglob("checkpoint_stopped"), *project.rglob(".*.work")]
    return sorted(str(path.relative_to(project)) for path in found if "failpoints" not in path.parts)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _without_timing(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_timing(value) for key, value in content.items() if key not in _TIMING}
    return _rounded(content) if isinstance(content, float) else content


_TUNE = ("tune", "--space", "space.yaml", "--name", "sweep")
_INFER = ("batch_infer", "--base-model", "base", "--quantization", "none", "--input", "rows.json")
_INFER += ("--output", "out/outputs.json", "--max-new-tokens", "4")
_WORSE = ("tune", "--space", "space.yaml", "--name", "worse", "--set", "search.epochs={choice: [1]}")
_BACK, _ON = ("promote", "tiny", "--roll-back"), ("promote", "tiny", "--version", "2")
_STUDY = ("study", "--study", "study.yaml", "--name", "study")
SCENARIOS = (
    Scenario("tune", _TUNE, ("tune", "--resume", "sweep"), tune_outcome),
    Scenario("batch_infer", _INFER, (*_INFER, "--resume"), batch_outcome),
    Scenario("study", _STUDY, _STUDY, study_outcome),
    Scenario("roll_back", _BACK, _BACK, registry_outcome, needs=(_WORSE, _TUNE)),
    Scenario("promote", _ON, _ON, registry_outcome, needs=(_WORSE, _TUNE, _BACK)),
)
