"""The registry: what is logged loads back and serves, the better adapter is champion, and there is a way
back.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from servers import mlflow_server
from test_training import tiny_bank

from qlora.config import BaseModelSettings, DecodingSettings, InputError, TrialSettings
from qlora.data.prompts import PROMPT_FOLDER
from ray_jobs.promote import table
from tracking import logged_model, registry, runs
from tracking import store as tracking_store

ROOT = Path(__file__).resolve().parent.parent
CODE = [ROOT / "qlora", ROOT / "inference"]


@pytest.fixture(scope="module", params=["sqlite", pytest.param("server", marks=pytest.mark.slow)])
def store(request, tmp_path_factory):
    """A tracking store of this module's own: a file as by default, or a server as a team would have it, with
    PostgreSQL and an S3-like store.
    """
    folder = tmp_path_factory.mktemp("store")
    with contextlib.ExitStack() as stack:
        uri = (
            f"sqlite:///{folder}/mlflow.db"
            if request.param == "sqlite"
            else stack.enter_context(mlflow_server(folder))
        )
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield folder
    mlflow.set_tracking_uri(None)


def logged(store, tiny_base, run_name: str, seed: int = 0) -> tuple[str, str]:
    """(run, URI) of a logged adapter that was never trained, with weights of its own."""
    client = tracking_store.connect()
    run = client.create_run(tracking_store.ensure_experiment(client, "course"), run_name=run_name).info.run_id
    client.log_param(run, "lora_r", 4)
    bank = tiny_bank()
    adapter = bank.attach(TrialSettings(lora_r=4, seed=seed))
    adapter.weights.normal_(std=0.2)
    bank.base_name = str(tiny_base)
    bank.save(adapter, store / run_name)
    files = logged_model.ModelFiles(
        store / run_name, PROMPT_FOLDER / "default.yaml", ROOT / "deploy" / "served_model.py", CODE
    )
    uri = logged_model.log_model(
        run, files, {"base_model": str(tiny_base), "quantization": "none"}, "翻譯：春", {"public_digest": "d"}
    )
    assert logged_model.log_model(run, files, {}, "", {}) == uri
    return run, uri


@pytest.mark.slow
def test_a_model_serves_in_a_new_process_what_the_engine_generates(store, tiny_base):
    """From the store alone: the script, the packages and the adapter that were kept there."""
    from inference.engine import ServedModel, load_engine
    from qlora.base.model import load_tokenizer
    from qlora.data.prompts import encode_prompt, load_prompt

    _, uri = logged(store, tiny_base, "served")
    fetched = registry.fetch_adapter(uri)
    assert (fetched.folder / "adapter_config.json").exists()
    asked = ["翻譯：春風", "翻譯：秋月明"]
    program = f"""
import json, mlflow
model = mlflow.pyfunc.load_model({uri!r})
rows = [{{"instruction": text}} for text in {asked!r}]
found = model.predict(rows, params={{"num_beams": 2, "max_new_tokens": 5}})
print(json.dumps(found["output"].tolist()))"""
    out = subprocess.run(
        [sys.executable, "-c", program],
        cwd=store,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    engine = load_engine(
        ServedModel(BaseModelSettings(name=str(tiny_base), quantization="none"), str(fetched.folder)),
        DecodingSettings(num_beams=2, max_new_tokens=5),
    )
    prompts = [encode_prompt(load_tokenizer(str(tiny_base)), load_prompt().render(text)) for text in asked]
    expected = {index: text for index, text, _ in engine.generate(prompts)}
    assert json.loads(out.stdout.splitlines()[-1]) == [expected[0], expected[1]]
    model = mlflow.models.get_model_info(uri)
    assert [column.name for column in model.signature.inputs] == ["instruction"]
    assert {parameter.name for parameter in model.signature.params} == {"num_beams", "max_new_tokens"}
    assert model.metadata == {"public_digest": "d"}


def test_the_better_adapter_is_champion_and_there_is_a_way_back(store, tiny_base):
    def register(number, perplexity, digest="d"):
        run, uri = logged(store, tiny_base, f"run{number}", seed=number)
        return registry.register("course", uri, run, perplexity, digest, {"sweep": "s"})

    first, worse, better, other = (
        register(1, 5.0),
        register(2, 6.0),
        register(3, 4.0),
        register(4, 1.0, digest="another"),
    )
    assert [one.is_champion for one in (first, worse, better, other)] == [True, False, True, False]
    assert "measured on other public examples" in other.reason
    assert (
        registry.fetch_adapter("models:/course@champion").model_uri == better.model_uri == "models:/course/3"
    )
    assert registry.fetch_adapter("models:/course@challenger").model_uri == "models:/course/4"
    description = tracking_store.connect().get_model_version("course", "1").description
    assert description.startswith("Not champion: version 3 took its place.")
    assert not registry.promote("course", "2").is_champion
    assert registry.roll_back("course").model_uri == "models:/course/1"
    assert registry.fetch_adapter("models:/course@champion").model_uri == "models:/course/1"
    with pytest.raises(InputError, match="had no champion before"):
        registry.roll_back("course")
    assert registry.promote("course", "3").is_champion
    listed = registry.versions("course")
    lines = table(listed).splitlines()
    assert lines[0].split()[:4] == ["version", "aliases", "public", "ppl"]
    assert lines[2].split()[:4] == ["3", "champion", "4", "-"]
    assert [(entry["version"], entry["aliases"]) for entry in listed] == [
        ("4", "challenger"),
        ("3", "champion"),
        ("2", ""),
        ("1", ""),
    ]
    for wrong in (
        lambda: registry.promote("course", "9"),
        lambda: registry.promote("nobody", "1"),
        lambda: registry.versions("nobody"),
        lambda: registry.roll_back("nobody"),
    ):
        with pytest.raises(InputError, match="models:/"):
            wrong()


def test_perplexities_are_compared_under_one_tokenizer_only(store, tiny_base):
    def register(number, perplexity, **facts):
        run, uri = logged(store, tiny_base, f"words{number}", seed=number)
        return registry.register("words", uri, run, perplexity, "d", facts)

    first = register(20, 5.0, tokenizer_digest="one", base_model="a")
    other = register(21, 1.0, tokenizer_digest="two", base_model="a")
    same = register(22, 4.0, tokenizer_digest="one", base_model="b")
    assert [one.is_champion for one in (first, other, same)] == [True, False, True]
    assert "has another tokenizer" in other.reason
    untold = register(23, 1.0, base_model="c")
    assert not untold.is_champion, "a version that does not say has to have the same base"


def test_perplexities_are_compared_at_one_length_only(store, tiny_base):
    def register(number, perplexity, **facts):
        run, uri = logged(store, tiny_base, f"cut{number}", seed=number)
        return registry.register("cut", uri, run, perplexity, "d", {"base_model": "a", **facts})

    before = register(30, 5.0)  # versions did not say so once, and were cut at 2048
    shorter = register(31, 1.0, max_length="64")
    same = register(32, 4.0, max_length="2048")
    assert [one.is_champion for one in (before, shorter, same)] == [True, False, True]
    assert "cut at 2048 tokens, this at 64" in shorter.reason


def test_an_adapter_that_is_no_better_than_its_base_is_never_champion(store, tiny_base):
    def register(number, perplexity):
        run, uri = logged(store, tiny_base, f"weak{number}", seed=number)
        return registry.register("weak", uri, run, perplexity, "d", {"zero_shot_public_perplexity": "5.0"})

    no_better, no_number = "no better than the base alone, which has 5", "nan, is no finite number"
    for number, perplexity, reason in (
        (30, 5.0, no_better),
        (31, 7.0, no_better),
        (32, float("nan"), no_number),
    ):
        found = register(number, perplexity)
        assert not found.is_champion
        assert reason in found.reason
    assert not registry.promote("weak", "1").is_champion
    with pytest.raises(InputError, match=r"weak has no champion: none of its versions .* models:/weak/3"):
        registry.fetch_adapter("models:/weak@champion")
    assert register(33, 4.9).is_champion
    assert registry.fetch_adapter("models:/weak@champion").model_uri == "models:/weak/4"


def test_a_champion_without_a_finite_perplexity_loses(store, tiny_base):
    """As one from before may be; no comparison with it would ever be true."""
    for number, perplexity in ((50, 4.0), (51, 6.0)):
        run, uri = logged(store, tiny_base, f"odd{number}", seed=number)
        registry.register("odd", uri, run, perplexity, "d", {})
    client = tracking_store.connect()
    assert client.get_model_version_by_alias("odd", "champion").tags["public_perplexity"] == "4.0"
    for value in ("nan", "much"):
        client.set_model_version_tag("odd", "1", "public_perplexity", value)
        client.set_registered_model_alias("odd", "champion", "1")
        assert registry.promote("odd", "2").is_champion


@pytest.mark.parametrize("name", ["a/b", "models:/x", ""])
def test_a_name_that_no_model_can_have_is_told_in_one_line(store, name):
    with pytest.raises(InputError, match="is no registered model"):
        registry.versions(name)


@pytest.mark.parametrize(
    "content",
    [
        "flavors: {sklearn: {}}",
        "flavors: {python_function: {artifacts: {adapter: {path: ../../other}}}}",
        "flavors: {python_function: {artifacts: {adapter: {path: /etc}}}}",
        "flavors: [1]",
        "[",
    ],
)
def test_a_model_without_an_adapter_of_its_own_is_told(content, tmp_path):
    (tmp_path / "MLmodel").write_text(content)
    with pytest.raises(InputError, match="is no model with an adapter of its own"):
        logged_model.fetch_model(str(tmp_path))


def test_a_version_knows_how_it_is_served_and_says_so(store, tiny_base):
    run, uri = logged(store, tiny_base, "served", seed=40)
    facts = {"base_model": str(tiny_base), "quantization": "none", "zero_shot_public_perplexity": "9.0"}
    registered = registry.register("served", uri, run, 5.0, "d", facts)
    found = registry.fetch_adapter(registered.model_uri)
    assert (found.base_model, found.quantization) == (str(tiny_base), "none")
    assert (
        found.prompt is not None and found.prompt.read_text() == (PROMPT_FOLDER / "default.yaml").read_text()
    )
    by_id = registry.fetch_adapter(uri)
    assert (by_id.base_model, by_id.quantization) == (str(tiny_base), "none"), "its own settings say so, too"
    description = tracking_store.connect().get_model_version("served", "1").description
    for words in ("Champion: the first champion", "**5**", "base alone 9", "--model models:/served/1"):
        assert words in description


def test_a_champion_that_was_made_by_hand_can_be_gone_back_to(store, tiny_base):
    run, uri = logged(store, tiny_base, "by-hand", seed=8)
    registry.register("hand", uri, run, 5.0, "d", {})
    tracking_store.connect().delete_registered_model_tag("hand", "champions")
    run, uri = logged(store, tiny_base, "by-register", seed=9)
    assert registry.register("hand", uri, run, 4.0, "d", {}).is_champion
    assert registry.roll_back("hand").model_uri == "models:/hand/1"
    run, uri = logged(store, tiny_base, "by-alias", seed=10)
    registry.register("hand", uri, run, 9.0, "d", {})
    tracking_store.connect().set_registered_model_alias("hand", "champion", "3")
    rolled = registry.roll_back("hand")
    assert (rolled.model_uri, rolled.reason) == ("models:/hand/1", "rolled back from version 3")
    tracking_store.connect().delete_model_version_tag("hand", "3", "public_perplexity")
    assert "no public perplexity is known of it" in registry.promote("hand", "3").reason


def test_uses_are_linked_to_the_version_that_made_them(store, tiny_base):
    run, uri = logged(store, tiny_base, "used", seed=7)
    registered = registry.register("linked", uri, run, 5.0, "d", {})
    registry.note_use(
        registry.fetch_adapter(registered.model_uri),
        "evaluation",
        {"data": "public.json"},
        {"mean_perplexity": 5.1},
    )
    client = tracking_store.connect()
    found = client.search_runs(
        [tracking_store.ensure_experiment(client, "linked")], "tags.kind = 'evaluation'"
    )
    assert [
        (one.info.status, one.data.tags["model_uri"], one.data.metrics["mean_perplexity"]) for one in found
    ] == [("FINISHED", "models:/linked/1", 5.1)]
    assert [one.model_id for one in client.get_run(found[0].info.run_id).inputs.model_inputs] == [
        uri.removeprefix("models:/")
    ]


def test_a_sweeps_runs_and_files(store, tmp_path):
    (tmp_path / "report.html").write_text("<p>report</p>")
    tracker = runs.start_sweep("night", "id", "team")
    data = {"train": ("train.json", "d" * 64, 3), "public": ("public.json", "e" * 64, 2)}
    runs.describe_sweep(tracker, {"seed": 0}, data)
    tracker.note({"hardware": "two cores"}, [tmp_path / "report.html"])
    with tracker.system_metrics():
        pass
    tracker.end("FINISHED", {"zero_shot_public_perplexity": 9.0})
    client = tracking_store.connect()
    run = client.get_run(tracker.parent_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["hardware"] == "two cores"
    assert run.data.metrics["zero_shot_public_perplexity"] == 9.0
    assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == {"train.json", "public.json"}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.html"]
    assert runs.start_sweep("night", "id", "team").parent_run_id == tracker.parent_run_id
    again = runs.start_sweep("night", "another id", "team")
    assert again.parent_run_id != tracker.parent_run_id, "an old name does not lead into old runs"
    opened = client.get_experiment(tracker.experiment_id)
    assert opened.tags["mlflow.experimentKind"] == "custom_model_development"
    with pytest.raises(Exception, match="models:/"):
        registry.fetch_adapter("models:/nobody@champion")
