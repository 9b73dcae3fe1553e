"""Ends a command of the registry before and after each of its writes, runs it again, and compares the stores.

python tests/killed_commands.py SCENARIO FOLDER  prints the number of places, and a line for each difference.
Every command runs in a forked process, so that MLflow is loaded once.
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlflow

from qlora.failpoints import VARIABLE, passages
from tracking import logged_model, registry, store

SCRIPT = """
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Echo(PythonModel):
    def predict(self, context, model_input, params=None):
        return model_input

set_model(Echo())
"""


def register(number: int, perplexity: float) -> None:
    """Log and register the adapter of a run of this number, as the end of a sweep does."""
    client = store.connect()
    experiment = store.ensure_experiment(client, "course")
    tags = {"number": str(number)}
    run = store.find_run(client, experiment, tags) or client.create_run(experiment, tags=tags)
    run_id, files = run.info.run_id, Path.cwd()
    model = logged_model.ModelFiles(
        files / "adapter", files / "prompt.yaml", files / "script.py", [files / "code"]
    )
    uri = logged_model.log_model(run_id, model, {"base_model": "b"}, "春", {})
    facts = {"sweep": "s", "zero_shot_public_perplexity": "9.0"}
    registry.register("course", uri, run_id, perplexity, "d", facts)


def two_versions() -> None:
    register(1, 5.0)
    register(2, 4.0)
    registry.roll_back("course")


def three_champions() -> None:
    for number, perplexity in ((1, 5.0), (2, 4.0), (3, 3.0)):
        register(number, perplexity)


def note_use() -> None:
    """Record a job that the first version was used for, as its end does, and that of a resumed one."""
    model = registry.fetch_adapter("models:/course/1")
    registry.note_use(model, "prediction", {"number": "9"}, {"rows": 3.0}, [Path("prompt.yaml")], "job")


# What is there before, and the command. A version's registration includes its logged model.
SCENARIOS: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "first": (store.connect, lambda: register(1, 5.0)),
    "better": (lambda: register(1, 5.0), lambda: register(2, 4.0)),
    "worse": (lambda: register(1, 5.0), lambda: register(2, 6.0)),
    "promote": (two_versions, lambda: registry.promote("course", "2")),
    "roll back": (three_champions, lambda: registry.roll_back("course")),
    "use": (lambda: register(1, 5.0), note_use),
}


def state() -> object:
    """Describe all that counts in a store, without what is random: ids and times."""
    client = store.connect()
    experiment = store.ensure_experiment(client, "course")
    runs = client.search_runs([experiment])
    number_of = {run.info.run_id: run.data.tags["number"] for run in runs}
    models = client.search_logged_models([experiment])
    registered = client.get_registered_model("course")
    return {
        "aliases": registered.aliases,
        "tags": registered.tags,
        "versions": sorted(
            [v.version, number_of[v.run_id], v.status, v.description, v.tags]
            for v in client.search_model_versions("name = 'course'")
        ),
        "models": sorted(
            [
                number_of[model.source_run_id],
                str(model.status),
                {key: value for key, value in model.tags.items() if "Versions" in key},
                sorted(file.path for file in client.list_logged_model_artifacts(model.model_id)),
            ]
            for model in models
        ),
        "inputs": sorted([number_of[run.info.run_id], len(run.inputs.model_inputs)] for run in runs),
        "uses": sorted(
            [run.info.status, run.data.metrics, len(client.list_artifacts(run.info.run_id))]
            for run in runs
            if "use_id" in run.data.tags
        ),
        "outputs": sorted([number_of[run.info.run_id], len(run.outputs.model_outputs)] for run in runs),
    }


def in_a_process_of_its_own(work: Callable[[], object], folder: Path, failpoints: Path | None = None) -> int:
    """Do work on the store of a folder; returns the signal that ended it, else its exit code."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    try:
        os.chdir(folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        if failpoints:
            os.environ[VARIABLE] = str(failpoints)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def state_of(folder: Path) -> object:
    path = folder / "state.json"
    assert in_a_process_of_its_own(lambda: path.write_text(json.dumps(state(), default=str)), folder) == 0
    return json.loads(path.read_text())


def main() -> None:
    before, command = SCENARIOS[sys.argv[1]]
    root = Path(sys.argv[2])
    start, undisturbed, points = root / "start", root / "undisturbed", root / "points"
    for name in ("adapter", "code"):
        (start / name).mkdir(parents=True)
        (start / name / "file.py").write_text("")
    (start / "prompt.yaml").write_text("template: x")
    (start / "script.py").write_text(SCRIPT)
    points.mkdir()
    assert in_a_process_of_its_own(before, start) == 0
    shutil.copytree(start, undisturbed)
    assert in_a_process_of_its_own(command, undisturbed, points) == 0
    expected = state_of(undisturbed)
    places = [
        f"{name} {when} {count}"
        for name, times in passages(points).items()
        for count in range(1, times + 1)
        for when in ("before", "after")
    ]
    print(len(places))
    for index, place in enumerate(places):
        folder, kill = root / f"place {index}", root / f"kill {index}"
        shutil.copytree(start, folder)
        kill.mkdir()
        (kill / "kill").write_text(place)
        assert in_a_process_of_its_own(command, folder, kill) == 9, place
        # A roll-back whose last write is done is done: the next one goes one further.
        if not (sys.argv[1] == "roll back" and place == "champion change done after 1"):
            assert in_a_process_of_its_own(command, folder) == 0, place
        if (found := state_of(folder)) != expected:
            print(json.dumps({"place": place, "found": found, "expected": expected}, ensure_ascii=False))
        shutil.rmtree(folder)


if __name__ == "__main__":
    mlflow.set_tracking_uri(None)
    main()
