"""Owns the registry of adapters: logging one as an MLflow model, registering it, its aliases, and models:/ URIs -> an adapter folder.

A model's files are a plain PEFT folder and the prompt it was trained with, beside the code that serves them. `challenger` is the
newest version; `champion` is the best on the public examples it was measured on, until it is told otherwise; earlier champions
are remembered, for the way back. Refuses to load models.
"""

import json
import logging
import re
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
from mlflow.entities import LoggedModelInput, LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from qlora.config import InputError
from qlora.provenance import package_versions
from tracking.runs import connect, ensure_experiment, tracking_uri

CHAMPION, CHALLENGER = "champion", "challenger"
_URI = re.compile(r"models:/(?:(m-[0-9a-f]+)|([^/@:]+)(?:@([^/@:]+)|/(\d+)))")
_HISTORY, _MODEL_ID = "champions", "logged_model"
_SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "instruction")]),
    outputs=Schema([ColSpec("string", "output")]),
    params=ParamSchema([ParamSpec("num_beams", "long", 3), ParamSpec("max_new_tokens", "long", 128)]),
)


@dataclass(frozen=True)
class ModelFiles:
    """What a model is made of: its PEFT folder, its prompt's YAML file, the script that serves it and the packages that script
    imports."""

    adapter: Path
    prompt: Path
    script: Path
    code: Sequence[Path]


@dataclass(frozen=True)
class Registration:
    """What became of a registered adapter: its URI and, in words, whether it is the champion and why."""

    model_uri: str
    is_champion: bool
    reason: str


@dataclass(frozen=True)
class RegisteredAdapter:
    """A version of the registry on this machine: its PEFT folder, its fixed URI, its tags, and the id of its logged model if it has
    one."""

    folder: Path
    model_uri: str
    tags: Mapping[str, str]
    model_id: str | None


def log_model(
    run_id: str, files: ModelFiles, settings: Mapping[str, str], example: str, metadata: Mapping[str, Any]
) -> str:
    """Log an adapter as an MLflow model of a run; returns its URI. `settings`: base_model and quantization, which the script needs.
    The same run's model is logged once.
    """
    client = connect()
    known = client.get_run(run_id).data.tags.get(_MODEL_ID)
    if known is not None:
        return f"models:/{known}"
    requirements = [f"{name}=={version.partition('+')[0]}" for name, version in package_versions().items()]
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id, name="adapter", source_run_id=run_id, params=run.data.params
    )
    described = Model(
        artifact_path=logged.artifact_location,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
        run_id=run_id,
        metadata=dict(metadata),
    )
    # saved, not logged by MLflow, which would load the base here to try the example
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        mlflow.pyfunc.save_model(
            path,
            mlflow_model=described,
            python_model=str(files.script),
            model_config=dict(settings),
            signature=_SIGNATURE,
            artifacts={"adapter": str(files.adapter), "prompt": str(files.prompt)},
            code_paths=[str(one) for one in files.code],
            input_example=pandas.DataFrame({"instruction": [example]}),
            pip_requirements=requirements,
        )
        client.log_model_artifacts(logged.model_id, str(path))
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.set_tag(run_id, _MODEL_ID, logged.model_id)
    return f"models:/{logged.model_id}"


def register(
    name: str,
    model_uri: str,
    run_id: str,
    public_perplexity: float,
    public_digest: str,
    facts: Mapping[str, str],
) -> Registration:
    """Make a logged model the newest version of a registered one, and champion if it beats the present one.

    Champions are compared on the same public examples only, told by `public_digest`. Registering the same run's adapter
    again changes nothing.
    """
    client = connect()
    tags = {"public_perplexity": repr(public_perplexity), "public_digest": public_digest, **facts}
    version = _version_of_run(client, name, run_id, tags) or _create_version(
        client, name, model_uri, run_id, tags
    )
    client.set_registered_model_alias(name, CHALLENGER, version.version)
    return _crowned_if_better(client, name, version)


def promote(name: str, number: str) -> Registration:
    """Make a version champion if it is better than the present one on the same public examples. Raises InputError for an unknown
    version."""
    client = connect()
    return _crowned_if_better(client, name, _version(client, name, number))


def roll_back(name: str) -> Registration:
    """Give the alias back to the champion before the present one. Raises InputError if there was none."""
    client = connect()
    _registered(client, name)
    history = _history(client, name)
    if len(history) < 2:
        raise InputError(f"models:/{name}", "had no champion before the present one")
    client.set_registered_model_tag(name, _HISTORY, json.dumps(history[:-1]))
    client.set_registered_model_alias(name, CHAMPION, history[-2])
    return Registration(f"models:/{name}/{history[-2]}", True, f"rolled back from version {history[-1]}")


def versions(name: str) -> list[dict[str, str]]:
    """All versions, newest first: their number, aliases and tags. Raises InputError for an unknown model."""
    client = connect()
    aliases = _registered(client, name).aliases
    found = sorted(
        client.search_model_versions(f"name = '{name}'"), key=lambda version: -int(version.version)
    )
    return [
        {
            "version": str(version.version),
            **version.tags,
            "aliases": ", ".join(
                alias for alias, number in aliases.items() if str(number) == str(version.version)
            ),
        }
        for version in found
    ]


def fetch_adapter(uri: str) -> RegisteredAdapter:
    """The adapter behind models:/NAME@ALIAS, models:/NAME/VERSION or a logged model's URI. Raises InputError if there is none."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise InputError(uri, "must read models:/NAME@ALIAS or models:/NAME/VERSION")
    model_id, name, alias, number = match.groups()
    client = connect()
    try:
        if model_id:
            return RegisteredAdapter(_peft_folder(uri), uri, {}, model_id)
        version = (
            client.get_model_version_by_alias(name, alias)
            if alias
            else client.get_model_version(name, number)
        )
        found = _peft_folder(_source(version))
    except MlflowException as error:
        raise InputError(
            uri,
            f"can't be had from {_without_password(tracking_uri())}: {error.message}; "
            "register one with ray_jobs/tune.py or set MLFLOW_TRACKING_URI",
        ) from error
    logged = _URI.fullmatch(_source(version))  # a database keeps no model_id
    return RegisteredAdapter(found, f"models:/{name}/{version.version}", version.tags, logged and logged[1])


def note_use(
    model: RegisteredAdapter,
    kind: str,
    facts: Mapping[str, Any],
    metrics: Mapping[str, float],
    files: Sequence[Path] = (),
) -> None:
    """A finished run of kind `evaluation` or `prediction`, linked to the version that made it, in the model's experiment."""
    client = connect()
    name = model.model_uri.removeprefix("models:/").partition("/")[0]
    run = client.create_run(
        ensure_experiment(client, name),
        run_name=f"{kind} by {model.model_uri.removeprefix('models:/')}",
        tags={
            "kind": kind,
            "model_uri": model.model_uri,
            **{key: str(value)[:5000] for key, value in facts.items()},
        },
    )
    if model.model_id:
        client.log_inputs(run.info.run_id, models=[LoggedModelInput(model.model_id)])
    for key, value in metrics.items():
        client.log_metric(run.info.run_id, key, value, model_id=model.model_id)
    for file in files:
        client.log_artifact(run.info.run_id, str(file))
    client.set_terminated(run.info.run_id, "FINISHED")


def is_model_uri(text: str) -> bool:
    """Whether a text means a registered model rather than a folder."""
    return text.startswith("models:")


def _create_version(
    client: MlflowClient, name: str, model_uri: str, run_id: str, tags: Mapping[str, str]
) -> ModelVersion:
    if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name)
    model_id = model_uri.removeprefix("models:/")
    version = client.create_model_version(name, model_uri, run_id, tags=dict(tags), model_id=model_id)
    client.set_logged_model_tags(
        model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([{"name": name, "version": version.version}])}
    )
    return version


def _version_of_run(
    client: MlflowClient, name: str, run_id: str, tags: Mapping[str, str]
) -> ModelVersion | None:
    found = client.search_model_versions(f"name = '{name}'")
    return next(
        (
            v
            for v in found
            if v.run_id == run_id and v.tags.get("public_perplexity") == tags["public_perplexity"]
        ),
        None,
    )


def _registered(client: MlflowClient, name: str) -> Any:
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        raise InputError(
            f"models:/{name}", "is no registered model; register one with ray_jobs/tune.py"
        ) from error


def _version(client: MlflowClient, name: str, number: str) -> ModelVersion:
    _registered(client, name)
    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        raise InputError(f"models:/{name}/{number}", "is no version of this model") from error


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    return client.get_model_version(name, str(number)) if number else None


def _history(client: MlflowClient, name: str) -> list[str]:
    return json.loads(client.get_registered_model(name).tags.get(_HISTORY, "[]"))  # type: ignore[no-any-return]


def _crowned_if_better(client: MlflowClient, name: str, version: ModelVersion) -> Registration:
    champion = _champion(client, name)
    is_champion, reason = _judge(champion, version)
    if is_champion and (champion is None or champion.version != version.version):
        before = _history(client, name) or ([str(champion.version)] if champion else [])
        client.set_registered_model_tag(name, _HISTORY, json.dumps([*before, str(version.version)]))
        client.set_registered_model_alias(name, CHAMPION, version.version)
    return Registration(f"models:/{name}/{version.version}", is_champion, reason)


def _judge(champion: ModelVersion | None, version: ModelVersion) -> tuple[bool, str]:
    if champion is None:
        return True, "the first champion of this model"
    if champion.version == version.version:
        return True, "it is the champion already"
    if champion.tags.get("public_digest") != version.tags.get("public_digest"):
        return False, (
            f"champion version {champion.version} was measured on other public examples; "
            "measure both on one file with ray_jobs/evaluate.py"
        )
    ours, theirs = float(version.tags["public_perplexity"]), float(champion.tags["public_perplexity"])
    return ours < theirs, f"public perplexity {ours:.4g} against {theirs:.4g} of version {champion.version}"


def _peft_folder(source: str) -> Path:
    """Where a model's PEFT folder is on this machine, downloaded if need be."""
    root = Path(download_artifacts(artifact_uri=source, tracking_uri=tracking_uri()))
    if not (root / "MLmodel").exists():
        return root
    described = yaml.safe_load((root / "MLmodel").read_text(encoding="utf-8"))
    return root / described["flavors"]["python_function"]["artifacts"]["adapter"]["path"]  # type: ignore[no-any-return]


def _source(version: ModelVersion) -> str:
    if version.source is None:
        raise InputError(f"models:/{version.name}/{version.version}", "has no files; register it again")
    return version.source


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)
