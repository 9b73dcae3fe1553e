"""A command of the registry may be ended anywhere: run again, it leaves what an undisturbed one leaves."""

import json
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from killed_commands import SCENARIOS, SCRIPT, register, state

from qlora.config import InputError
from tracking import registry, store


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_command_that_was_ended_anywhere_is_completed_by_the_next(scenario, tmp_path):
    program = Path(__file__).with_name("killed_commands.py")
    out = subprocess.run(
        [sys.executable, program, scenario, tmp_path], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr[-3000:]
    num_places, *differences = out.stdout.splitlines()
    assert int(num_places) >= 10
    assert differences == []


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A store with a registered model: version 2 is champion, after version 1."""
    monkeypatch.chdir(tmp_path)
    for name in ("adapter", "code"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.py").write_text("")
    (tmp_path / "prompt.yaml").write_text("template: x")
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    register(1, 5.0)
    register(2, 4.0)
    yield store.connect()
    mlflow.set_tracking_uri(None)


def champion_and_history(client) -> tuple[str, str]:
    model = client.get_registered_model("course")
    return str(model.aliases["champion"]), model.tags["champions"]


def opened(kind: str, start: str, to: str, history: list[str]) -> str:
    """The tag that a command leaves which was ended right after it had written down a change."""
    change = {"kind": kind, "start": start, "to": to, "history": history, "reason": "as it was"}
    return json.dumps(change)


def test_what_a_roll_back_left_is_completed_and_goes_no_further(course):
    register(3, 3.0)
    course.set_registered_model_tag("course", "champion_change", opened("roll back", "3", "2", ["1", "2"]))
    assert registry.roll_back("course").model_uri == "models:/course/2"
    assert champion_and_history(course) == ("2", '["1", "2"]')
    assert "champion_change" not in course.get_registered_model("course").tags
    assert course.get_model_version("course", "2").description.startswith("Champion: as it was.")
    assert course.get_model_version("course", "3").description.startswith("Not champion: version 2 took")
    assert registry.roll_back("course").model_uri == "models:/course/1", "the next one goes one further"


def test_another_command_completes_what_is_open_before_its_own(course):
    course.set_registered_model_tag("course", "champion_change", opened("roll back", "2", "1", ["1"]))
    assert registry.promote("course", "2").reason == "public perplexity 4 against 5 of version 1"
    assert champion_and_history(course) == ("2", '["1", "2"]')


def test_a_change_that_something_else_has_overtaken_is_given_up(course):
    register(3, 6.0)
    course.set_registered_model_tag("course", "champion_change", opened("roll back", "2", "1", ["1"]))
    course.set_registered_model_alias("course", "champion", "3")
    assert registry.roll_back("course").model_uri == "models:/course/2"
    assert champion_and_history(course) == ("2", '["1", "2"]')


def test_an_earlier_store_that_was_left_halfway_is_gone_on_with(course):
    """History and alias were two writes with nothing to tell that one was missing."""
    course.set_registered_model_alias("course", "champion", "1")
    assert registry.promote("course", "2").is_champion
    assert champion_and_history(course) == ("2", '["1", "2"]')
    course.set_registered_model_tag("course", "champions", '["1", "2", "2"]')
    assert registry.roll_back("course").model_uri == "models:/course/1"
    course.set_registered_model_alias("course", "champion", "2")  # ended after it had written the history
    assert registry.roll_back("course").model_uri == "models:/course/1"


@pytest.mark.parametrize("damage", ["[1", "{}", "3", '["1", null]', '["one"]', "null"])
def test_a_damaged_history_is_told_or_rebuilt(course, damage):
    course.set_registered_model_tag("course", "champions", damage)
    with pytest.raises(InputError, match="models:/course: has a damaged tag champions") as caught:
        registry.roll_back("course")
    assert len(str(caught.value).splitlines()) == 1
    register(3, 3.0)
    assert champion_and_history(course) == ("3", '["2", "3"]')
    course.set_registered_model_tag("course", "champion_change", damage)
    assert registry.roll_back("course").model_uri == "models:/course/2"


def test_a_version_that_is_gone_is_not_gone_back_to(course):
    register(3, 3.0)
    course.delete_model_version("course", "2")
    assert registry.roll_back("course").model_uri == "models:/course/1"


def test_an_unfinished_model_is_finished_and_a_second_one_removed(course):
    run = course.create_run(store.ensure_experiment(course, "course"), tags={"number": "4"}).info
    for _ in range(2):  # what a process left that was ended while it brought the files
        course.create_logged_model(run.experiment_id, name="adapter", source_run_id=run.run_id)
    register(4, 2.0)
    found = state()
    assert [model[:2] for model in found["models"] if model[0] == "4"] == [["4", "READY"]]
    assert ["4", 1] in found["outputs"]
    assert champion_and_history(course)[0] == "3"
