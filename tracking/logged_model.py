"""Owns an adapter as an MLflow model: a PEFT folder and its prompt, beside the code that serves them.

Refuses to load models, and to know versions and aliases.
"""

import importlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas
import yaml
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Run
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from qlora.config import InputError
from qlora.failpoints import durable
from qlora.provenance import package_versions
from tracking.address import tracking_uri
from tracking.store import asking, connect

_SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "instruction")]),
    outputs=Schema([ColSpec("string", "output")]),
    params=ParamSchema([ParamSpec("num_beams", "long", 3), ParamSpec("max_new_tokens", "long", 128)]),
)


@dataclass(frozen=True)
class ModelFiles:
    """The files that a model is made of.

    adapter: its PEFT folder. prompt: its template's YAML file. script: what serves it. code: the packages
    that the script imports. trained_on: what tells what its training examples ask, if that is known.
    """

    adapter: Path
    prompt: Path
    script: Path
    code: Sequence[Path]
    trained_on: Path | None = None


@dataclass(frozen=True)
class FetchedModel:
    """A model's files on this machine.

    adapter: its PEFT folder. prompt: its template's file. trained_on: what tells what its training examples
    ask. settings: what its script is given.
    """

    adapter: Path
    prompt: Path | None
    trained_on: Path | None
    settings: Mapping[str, str]


def load_libraries() -> None:
    """Import what `log_model` would import on first use."""
    for name in ("mlflow.pyfunc", "mlflow.models"):
        importlib.import_module(name)


@asking()
def log_model(
    run_id: str, files: ModelFiles, settings: Mapping[str, str], example: str, metadata: Mapping[str, Any]
) -> str:
    """Log an adapter as an MLflow model of a run; returns its URI. The same run's model is logged once.

    One that an ended process left unfinished is finished. `settings`: base_model and quantization, which the
    script needs.
    """
    client = connect()
    run = client.get_run(run_id)
    known = _models_of(client, run)
    logged = next((model for model in known if _is_ready(model)), known[0] if known else None)
    for other in known:
        if other is not logged:
            _delete(client, other.model_id)
    if logged is not None and _is_ready(logged):
        return f"models:/{logged.model_id}"
    if logged is None:
        with durable("model created"):
            logged = client.create_logged_model(
                run.info.experiment_id, name="adapter", source_run_id=run_id, params=run.data.params
            )
    _upload(client, run_id, logged, files, settings, example, metadata)
    # The run's outputs are appended to, so that a second time would show the model twice.
    outputs = run.outputs.model_outputs if run.outputs else []
    if logged.model_id not in [output.model_id for output in outputs]:
        with durable("model linked"):
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    with durable("model finalized"):
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    return f"models:/{logged.model_id}"


@asking()
def withdraw_model(run_id: str, model_uri: str) -> None:
    """Take back a model that `log_model` gave, if it is still there: the run's next one is logged anew."""
    client = connect()
    for model in _models_of(client, client.get_run(run_id)):
        if f"models:/{model.model_id}" == model_uri:
            _delete(client, model.model_id)


@asking()
def fetch_model(source: str) -> FetchedModel:
    """Bring a model's files to this machine, if they are not here.

    A bare PEFT folder counts as a model, too. Raises InputError for a model that names no adapter within its
    own folder.
    """
    root = Path(download_artifacts(artifact_uri=source, tracking_uri=tracking_uri()))
    if not (root / "MLmodel").exists():
        return FetchedModel(root, None, None, {})
    try:
        content = yaml.safe_load((root / "MLmodel").read_text(encoding="utf-8"))
        flavor = content["flavors"]["python_function"]
        artifacts, config = flavor["artifacts"], flavor.get("config") or {}
        adapter = _within(root, artifacts["adapter"]["path"])
        prompt, trained_on = (
            _within(root, artifacts[name]["path"]) if name in artifacts else None
            for name in ("prompt", "trained_on")
        )
        return FetchedModel(adapter, prompt, trained_on, dict(config))
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError, OSError):
        raise InputError(source, "is no model with an adapter of its own: its MLmodel names none") from None


def _within(root: Path, path: str) -> Path:
    """Return a path of a model's folder. Raises ValueError for one that leads out of it."""
    found = root / path
    if not found.resolve().is_relative_to(root.resolve()):
        raise ValueError(path)
    return found


def _models_of(client: MlflowClient, run: Run) -> list[LoggedModel]:
    """Return the models that a run has already, finished or not."""
    query = f"source_run_id = '{run.info.run_id}'"
    return list(client.search_logged_models([run.info.experiment_id], query))


def _is_ready(model: LoggedModel) -> bool:
    return model.status == LoggedModelStatus.READY


def _delete(client: MlflowClient, model_id: str) -> None:
    with durable("model deleted"):
        client.delete_logged_model(model_id)


def _upload(
    client: MlflowClient,
    run_id: str,
    logged: LoggedModel,
    files: ModelFiles,
    settings: Mapping[str, str],
    example: str,
    metadata: Mapping[str, Any],
) -> None:
    """Make the model's folder and bring it to the store.

    It is saved, not logged by MLflow, which would load the base here to try the example.
    """
    requirements = [f"{name}=={version.partition('+')[0]}" for name, version in package_versions().items()]
    described = Model(
        artifact_path=logged.artifact_location,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
        run_id=run_id,
        metadata=dict(metadata),
    )
    artifacts = {"adapter": files.adapter, "prompt": files.prompt, "trained_on": files.trained_on}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        mlflow.pyfunc.save_model(
            path,
            mlflow_model=described,
            python_model=str(files.script),
            model_config=dict(settings),
            signature=_SIGNATURE,
            artifacts={name: str(place) for name, place in artifacts.items() if place},
            code_paths=[str(one) for one in files.code],
            input_example=pandas.DataFrame({"instruction": [example]}),
            pip_requirements=requirements,
        )
        with durable("model logged"):
            client.log_model_artifacts(logged.model_id, str(path))
