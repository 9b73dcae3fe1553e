"""A whole sweep on a tiny base with a real local Ray and a real MLflow store: run, stop, resume, register,
use.
"""

import html
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, finished
from oracles import loop_perplexities
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.base.reference import base_digest
from qlora.data.examples import load_examples
from qlora.data.prompts import encode_examples, load_prompt

pytestmark = pytest.mark.ray


def ledger(project: Path, name: str) -> dict[str, dict]:
    records = [
        json.loads(path.read_text())
        for path in sorted((project / "results" / name / "trials").glob("*.json"))
    ]
    return {record["trial_id"]: record for record in records}


def wait_for_a_report(process: subprocess.Popen, project: Path, name: str) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not any(
        record["curve"] for record in ledger(project, name).values()
    ):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def sweep(project):
    """A sweep whose driver is killed as soon as a trial has reported, then resumed to its end."""
    process = command(project, "tune", "--space", "space.yaml", "--name", "one", start_new_session=True)
    wait_for_a_report(process, project, "one")
    before = ledger(project, "one")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    out = finished(command(project, "tune", "--resume", "one"))
    return before, out, json.loads((project / "results/one/summary.json").read_text())


def test_a_killed_sweep_resumes_with_the_same_trials(project, sweep):
    before, _, summary = sweep
    after = ledger(project, "one")
    assert before
    assert set(before) <= set(after)
    assert all(after[trial]["config"] == record["config"] for trial, record in before.items())
    assert len(summary["trials"]) == 5
    for record in after.values():
        steps = [point["step"] for point in record["curve"]]
        assert steps == sorted(set(steps))


def test_the_summary_keeps_its_contract(project, sweep):
    _, out, summary = sweep
    assert set(summary) >= {"sweep", "space", "metric", "zero_shot", "trials", "best"}
    assert summary["metric"] == "public_perplexity"
    for trial in summary["trials"]:
        assert set(trial["config"]) == {"learning_rate", "lora_r", "lora_alpha", "lora_dropout", "epochs"}
        assert trial["status"] in ("finished", "stopped")
        assert trial["curve"][0].keys() == {"step", "epoch", "public_perplexity"}
    lowest = min(point["public_perplexity"] for trial in summary["trials"] for point in trial["curve"])
    assert summary["best"]["public_perplexity"] == lowest < summary["zero_shot"]
    assert any(trial["status"] == "stopped" for trial in summary["trials"])
    assert "saved" in out
    seconds = summary["host_seconds"]
    assert f"hosts       training {seconds['training'] / sum(seconds.values()):.0%}" in out
    assert (project / summary["best"]["checkpoint"] / "adapter_config.json").exists()


def test_disk_holds_two_checkpoints_a_trial_at_most(project, sweep):
    trials = [path for path in (project / "results/one/ray").iterdir() if path.is_dir()]
    assert len(trials) == 5
    assert all(1 <= len(list(trial.glob("checkpoint_*"))) <= 2 for trial in trials)


def test_the_adapter_gives_its_perplexity_in_plain_peft(project, sweep, tiny_base):
    """No packing, no code of ours but the prompt: transformers, PEFT and a loop."""
    best = sweep[2]["best"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), project / best["checkpoint"]
    )
    examples = load_examples(project / "public.json", need_output=True)
    encoded = encode_examples(
        AutoTokenizer.from_pretrained(tiny_base), load_prompt(str(project / "plain.yaml")), examples, "public"
    )
    values = loop_perplexities(model.eval(), encoded)
    assert sum(values) / len(values) == pytest.approx(best["public_perplexity"], rel=1e-4)


def test_runs_end_in_a_terminal_status_and_are_not_doubled(project, sweep):
    with sqlite3.connect(project / "mlruns/mlflow.db") as store:
        runs = store.execute("select status, run_uuid from runs").fetchall()
        children = store.execute("select count(*) from tags where key = 'mlflow.parentRunId'").fetchone()[0]
        points = store.execute(
            "select run_uuid, step, count(*) from metrics where key = 'public_perplexity' group by 1, 2"
        ).fetchall()
        inputs = store.execute("select value from input_tags where name = 'mlflow.data.context'").fetchall()
    assert len(runs) == 6
    assert children == 5
    assert {status for status, _ in runs} == {"FINISHED"}
    assert all(count == 1 for *_, count in points)
    assert {value for (value,) in inputs} == {"train", "public"}


def test_runs_tell_where_they_come_from_and_how_they_ended(project, tiny_base, sweep):
    best = sweep[2]["best"]
    with sqlite3.connect(project / "mlruns/mlflow.db") as store:
        parent, folder = store.execute(
            "select run_uuid, artifact_uri from runs where name = 'one'"
        ).fetchone()
        tags = dict(store.execute("select key, value from tags where run_uuid = ?", (parent,)).fetchall())
        system = store.execute(
            "select count(*) from metrics where run_uuid = ? and key like 'system/%'", (parent,)
        ).fetchone()[0]
        reasons = store.execute("select value from tags where key = 'reason'").fetchall()
        checkpoints = dict(
            store.execute("select run_uuid, value from tags where key = 'checkpoint'").fetchall()
        )
        epochs = store.execute(
            "select step, value from metrics where key = 'epoch_public_perplexity' and run_uuid = ? "
            "order by step",
            (best["mlflow_run_id"],),
        ).fetchall()
        version = dict(
            store.execute(
                "select key, value from model_version_tags where name = 'tiny' and version = 1"
            ).fetchall()
        )
    assert (version["base_model"], version["base_digest"]) == (str(tiny_base), base_digest(str(tiny_base)))
    assert {"hardware", "public_digest", "train_digest", "version.torch", "version.ray"} <= tags.keys()
    assert (tags["best_trial"], tags["model_uri"]) == (best["trial_id"], best["model_uri"])
    assert f"Trial {best['trial_id']} is best" in tags["mlflow.note.content"]
    assert system > 0
    assert {reason for (reason,) in reasons} == {
        f"early stopping, at {percent} % of its schedule" for percent in _stops(project)
    }
    assert len(checkpoints) == 5
    assert all(Path(path, "adapter").is_dir() for path in checkpoints.values())
    curve = {
        point["epoch"]: point["public_perplexity"]
        for trial in sweep[2]["trials"]
        if trial["trial_id"] == best["trial_id"]
        for point in trial["curve"]
    }
    assert epochs == [(int(epoch), value) for epoch, value in curve.items() if epoch == int(epoch)]
    artifacts = Path(folder.removeprefix("file://"))
    assert {path.name for path in artifacts.iterdir()} >= {"report.html", "summary.json", "sweep.json"}
    page = (project / "results/one/report.html").read_text(encoding="utf-8")
    assert f"Trial {best['trial_id']} is best" in page
    assert "95 % interval over examples" in page


def _stops(project):
    return {
        f"{record['curve'][-1]['schedule_percent']:.3g}"
        for record in ledger(project, "one").values()
        if record["status"] == "stopped"
    }


def test_the_champion_serves_evaluation_and_inference_as_it_was_trained(project, sweep):
    """Base, quantisation and prompt are the version's own, though every one of them differs from the
    defaults.
    """
    best = sweep[2]["best"]
    assert best["model_uri"] == "models:/tiny/1"
    kept = "results/one/public.jsonl"
    asked = ["--adapter", "models:/tiny@champion", "--data", kept, "--output", "out/evaluation.json"]
    assert "8 of 8 rows ask what the adapter was trained on" in finished(command(project, "evaluate", *asked))
    evaluation = json.loads((project / "out/evaluation.json").read_text())
    assert evaluation["mean_perplexity"] == pytest.approx(best["public_perplexity"], rel=1e-5)
    assert evaluation["count"] == len(evaluation["perplexities"]) == 8
    assert (evaluation["settings"]["quantization"], evaluation["settings"]["prompt"]) == (
        "none",
        "plain.yaml",
    )
    asked = ["--model", "models:/tiny@champion", "--input", "public.json", "--output", "out/outputs.json"]
    out = finished(command(project, "batch_infer", *asked, "--max-new-tokens", "6"))
    assert "8 rows (8 generated now" in out
    assert "in place of" not in out
    assert "8 of 8 rows ask what the adapter was trained on" in out
    assert "chrf" in out
    meta = json.loads((project / "out/outputs.json.meta.json").read_text())
    assert meta["model_uri"] == "models:/tiny/1"
    assert meta["scores"]["count"] == 8
    assert (meta["prompt"], meta["base"]["quantization"]) == ("plain.yaml", "none")
    outputs = json.loads((project / "out/outputs.json").read_text())
    assert [row["id"] for row in outputs] == [f"e{n}" for n in range(16, 24)]
    assert all(row.keys() == {"id", "output"} for row in outputs)
    with sqlite3.connect(project / "mlruns/mlflow.db") as store:
        uses = store.execute(
            "select kind.value, uri.value, status from tags kind join tags uri using (run_uuid) join runs "
            "using (run_uuid) where kind.key = 'kind' and uri.key = 'model_uri' and kind.value != 'sweep' "
            "order by 1"
        ).fetchall()
    assert uses == [
        ("evaluation", "models:/tiny/1", "FINISHED"),
        ("prediction", "models:/tiny/1", "FINISHED"),
    ]


@pytest.mark.slow
def test_options_override_a_version_and_say_so(project, sweep):
    data = ["--data", "public.json", "train.json", "--max-length", "300", "--output", "out/other.json"]
    asked = ["--adapter", "models:/tiny@champion", *data]
    out = finished(command(project, "evaluate", *asked, "--prompt", "default", "--quantization", "nf4"))
    assert "24 of 24 rows ask what the adapter was trained on" in out
    assert "max length 300, in place of 2048" in out
    assert "prompt default, in place of plain.yaml, which models:/tiny/1 is served with" in out
    assert "quantization nf4, in place of none" in out
    settings = json.loads((project / "out/other.json").read_text())["settings"]
    assert (settings["prompt"], settings["quantization"]) == ("default", "nf4")
    before = (project / "plain.yaml").read_text()
    (project / "plain.yaml").write_text(before.replace("問", "題"))
    try:
        out = finished(command(project, "evaluate", *asked, "--prompt", "plain.yaml"))
    finally:
        (project / "plain.yaml").write_text(before)
    assert (
        "prompt plain.yaml as it reads now, in place of its text which models:/tiny/1 is served with" in out
    )


def test_a_finished_sweep_is_not_run_again(project, sweep):
    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (project / "results/one").rglob("*")}

    before = state()
    assert "models:/tiny/1" in finished(command(project, "tune", "--resume", "one"))
    assert state() == before
    process = command(project, "tune", "--space", "space.yaml", "--name", "one")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "holds a finished sweep" in out


@pytest.fixture
def unfinished(project, sweep):
    """The sweep as if it had been stopped before its registration."""
    path = project / "results/one/summary.json"
    content = path.read_text()
    path.unlink()
    yield
    path.write_text(content)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("plain.yaml", "問", "題"), ("public.json", "春", "夏"), ("train.json", "春", "夏")],
)
def test_a_sweep_of_changed_files_does_not_go_on(project, unfinished, name, old, new):
    path = project / name
    before = path.read_text()
    try:
        path.write_text(before.replace(old, new).replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1]))
        process = command(project, "tune", "--resume", "one")
        out, _ = process.communicate(timeout=60)
    finally:
        path.write_text(before)
    assert process.returncode == 2, out
    assert f"{name}: changed since the sweep started" in out


def test_a_sweep_of_a_changed_base_does_not_go_on(project, unfinished, tiny_base):
    template = tiny_base / "chat_template.jinja"
    try:
        template.write_text("{{ messages[0]['content'] }}")
        process = command(project, "tune", "--resume", "one")
        out, _ = process.communicate(timeout=60)
    finally:
        template.unlink()
    assert process.returncode == 2, out
    assert f"{tiny_base}: changed since the sweep started" in out


def test_the_last_lines_and_the_page_lead_to_what_counts(project, sweep):
    _, out, summary = sweep
    page = (project / "results/one/report.html").read_text(encoding="utf-8")
    experiment, run = summary["mlflow_experiment_id"], summary["mlflow_run_id"]
    for address in (
        f"#/experiments/{experiment}/runs?workflowType=machine_learning",
        f"viewStateShareKey=sweep-{run}",
        f"#/experiments/{experiment}/runs/{run}?",
        "#/models/tiny/versions/1?",
    ):
        assert f"http://127.0.0.1:5000/{address}" in out or address in out
        assert html.escape(address) in page
    with sqlite3.connect(project / "mlruns/mlflow.db") as store:
        tags = dict(store.execute("select key, value from experiment_tags").fetchall())
        note = store.execute(
            "select value from tags where key = 'mlflow.note.content' and run_uuid = ?", (run,)
        ).fetchone()[0]
        versions = store.execute("select description from model_versions where name = 'tiny'").fetchall()
        stages = [value for (value,) in store.execute("select value from params where key = 'stages'")]
    description = versions[0][0]
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    axes = json.loads(tags[f"mlflow.sharedViewState.sweep-{run}"])["compareRunCharts"][0]
    assert axes["selectedParams"] == ["learning_rate", "lora_r", "lora_alpha", "lora_dropout", "stages"]
    assert {value[0] for value in stages} == {"["}, "no value of an axis is a number where others are texts"
    assert axes["selectedMetrics"] == ["best_public_perplexity"]
    assert f"(#/experiments/{experiment}/runs?" in note
    assert "Champion: the first champion of this model." in description
    assert f"{summary['best']['public_perplexity']:.5g}" in description
    assert "--model models:/tiny/1" in description


@pytest.mark.slow
def test_people_see_a_finished_sweep_in_the_ui(project, sweep, tmp_path):
    """MLflow's pages in a browser without stored settings: a newcomer sees what trials are compared by."""
    pytest.importorskip("PySide6.QtWebEngineWidgets", reason="pip install '.[browser]'")
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlruns/mlflow.db"}
    script = [sys.executable, ROOT / "docs/screenshots.py", "one", "--results", project / "results"]
    out = subprocess.run(
        [*script, "--out", tmp_path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stderr
    texts, summary = json.loads(out.stdout.splitlines()[-1]), sweep[2]
    assert {path.stem for path in tmp_path.glob("*.png")} == set(texts)
    best = summary["best"]
    for trial in summary["trials"]:
        assert f"one-{trial['trial_id']}" in texts["trials"]
        assert f"one-{trial['trial_id']}" in texts["compare"]
    for words in ("Traces\n0", "Detect Issues"):
        assert all(words not in text for text in texts.values())
    assert "Sort: best_public_perplexity" in texts["trials"]
    assert "settings and best public perplexity" in texts["compare"]
    assert "[2]" in texts["compare"] and "[1, 1]" in texts["compare"], "an axis shows all values"
    assert "public_perplexity" in texts["compare"] and "training_loss" in texts["compare"]
    assert f"Trial {best['trial_id']} is best" in texts["sweep"]
    assert "epoch_public_perplexity" in texts["trial"]
    assert "champion" in texts["model"]
    assert f"Public perplexity {best['public_perplexity']:.5g}" in texts["model"]


@pytest.mark.slow
def test_a_killed_host_costs_its_trials_only_time(project, sweep):
    """The trials of a dead host come back from their checkpoints on a new one, and score what they would have
    scored.
    """
    process = command(
        project,
        "tune",
        "--space",
        "space.yaml",
        "--name",
        "two",
        "--set",
        "registered_model=other",
        start_new_session=True,
    )
    wait_for_a_report(process, project, "two")
    listing = subprocess.run(
        ["ps", "-eo", "pid,sid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]
    hosts = [
        int(line.split()[0])
        for line in listing
        if "ray::HostActor" in line and int(line.split()[1]) == process.pid
    ]
    assert len(hosts) == 1, listing
    os.kill(hosts[0], signal.SIGKILL)
    finished(process)
    summary = json.loads((project / "results/two/summary.json").read_text())
    assert len(summary["trials"]) == 5
    assert {trial["status"] for trial in summary["trials"]} <= {"finished", "stopped"}

    def scores(trials):
        return {
            (json.dumps(trial["config"]), point["step"]): point["public_perplexity"]
            for trial in trials
            for point in trial["curve"]
        }

    first, second = scores(sweep[2]["trials"]), scores(summary["trials"])
    common = first.keys() & second.keys()
    assert len(common) >= 5
    assert [second[key] for key in common] == pytest.approx([first[key] for key in common], rel=1e-4)


def test_a_dry_run_starts_nothing(project, sweep):
    out = finished(command(project, "tune", "--space", "space.yaml", "--name", "planned", "--dry-run"))
    assert "5 by random search" in out
    assert "side by side on one base" in out
    assert "memory" in out
    assert not (project / "results/planned").exists()
