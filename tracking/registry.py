"""Owns the registry of adapters: versions of a registered model, their aliases, models:/ URIs -> adapters.

`challenger` is the newest version; who is `champion` is decided in tracking.champion. Every command can be
ended anywhere and be run again: what it left is found and completed. Refuses to load models.
"""

import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from qlora.addresses import without_password
from qlora.config import InputError
from qlora.failpoints import durable
from tracking import champion
from tracking.address import tracking_uri
from tracking.champion import CHAMPION, Registration
from tracking.endings import killed_if_left
from tracking.logged_model import fetch_model
from tracking.store import asking, connect, ensure_experiment, find_run

CHALLENGER = "challenger"
_URI = re.compile(r"models:/(?:(m-[0-9a-f]+)|([^/@:]+)(?:@([^/@:]+)|/(\d+)))")
_READY, _UNKNOWN, _NO_NAME = "READY", "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"


@dataclass(frozen=True)
class RegisteredAdapter:
    """A version of the registry on this machine.

    folder: its PEFT folder. prompt: the file of the prompt that it was trained with. trained_on: what tells
    what its training examples ask. model_uri: its fixed URI. base_model, quantization: what it is served on.
    model_id: of its logged model, if it has one.
    """

    folder: Path
    prompt: Path | None
    trained_on: Path | None
    model_uri: str
    tags: Mapping[str, str]
    base_model: str | None
    quantization: str | None
    model_id: str | None


@asking()
def register(
    name: str,
    model_uri: str,
    run_id: str,
    public_perplexity: float,
    public_digest: str,
    facts: Mapping[str, str],
) -> Registration:
    """Make a logged model the newest version of a registered one, and champion if it beats the present one.

    Champions are compared on the same public examples only, told by `public_digest`, cut at the same length
    (fact `max_length`) and read by the same tokenizer (fact `tokenizer_digest`), and have to beat the base
    alone (fact `zero_shot_public_perplexity`).
    Registering the same run's adapter again changes nothing.
    """
    client = connect()
    tags = {"public_perplexity": repr(public_perplexity), "public_digest": public_digest, **facts}
    version = _version_of_run(client, name, run_id, tags)
    version = version or _create_version(client, name, model_uri, run_id, tags)
    _link(client, version, model_uri)
    with durable("alias challenger"):
        client.set_registered_model_alias(name, CHALLENGER, version.version)
    return champion.crown_if_better(client, name, version)


@asking()
def promote(name: str, number: str) -> Registration:
    """Make a version champion if it is better than the present one.

    Raises InputError for an unknown version.
    """
    client = connect()
    return champion.crown_if_better(client, name, _version(client, name, number))


@asking()
def roll_back(name: str) -> Registration:
    """Give the alias back to the champion before the present one. Raises InputError if there was none."""
    client = connect()
    _registered(client, name)
    return champion.roll_back(client, name)


@asking()
def versions(name: str) -> list[dict[str, str]]:
    """List all versions, newest first: their number, aliases and tags.

    Raises InputError for an unknown model.
    """
    client = connect()
    aliases = _registered(client, name).aliases
    found = client.search_model_versions(f"name = '{name}'")
    listed = []
    for version in sorted(found, key=lambda version: -int(version.version)):
        own = [alias for alias, number in aliases.items() if str(number) == str(version.version)]
        listed.append({"version": str(version.version), **version.tags, "aliases": ", ".join(own)})
    return listed


@asking()
def fetch_adapter(uri: str) -> RegisteredAdapter:
    """Fetch the adapter behind models:/NAME@ALIAS, models:/NAME/VERSION or a logged model's URI.

    Raises InputError if there is none.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise InputError(uri, "must read models:/NAME@ALIAS or models:/NAME/VERSION")
    model_id, name, alias, number = match.groups()
    client = connect()
    try:
        with asking():  # a server that is away has nothing to do with this URI
            if model_id:
                return _fetched(uri, uri, {}, model_id)
            if alias == CHAMPION:
                _refuse_without_champion(client, uri, name)
            version = (
                client.get_model_version_by_alias(name, alias)
                if alias
                else client.get_model_version(name, number)
            )
            source = version.source
            if source is None:
                raise InputError(uri, "has no files; register it again")
            logged = _URI.fullmatch(source)  # a database keeps no model_id
            return _fetched(source, f"models:/{name}/{version.version}", version.tags, logged and logged[1])
    except MlflowException as error:
        raise InputError(
            uri,
            without_password(f"can't be had from {tracking_uri()}: {error.message}")
            + "; register one with ray_jobs/tune.py or set MLFLOW_TRACKING_URI",
        ) from None


@asking()
def note_use(
    model: RegisteredAdapter,
    kind: str,
    facts: Mapping[str, Any],
    metrics: Mapping[str, float],
    files: Sequence[Path] = (),
    use_id: str | None = None,
) -> None:
    """Log a finished run of kind `evaluation`, `prediction` or `export`, linked to the version that made it.

    `use_id`: of this very use; what an ended process left of its run is completed.
    """
    client = connect()
    own_name = model.model_uri.removeprefix("models:/")
    experiment_id = ensure_experiment(client, own_name.partition("/")[0])
    known = {"use_id": use_id or secrets.token_hex(16)}
    tags = {"kind": kind, "model_uri": model.model_uri, **known}
    tags |= {key: str(one)[:5000] for key, one in facts.items()}
    with killed_if_left(experiment_id, known):
        run = find_run(client, experiment_id, known) if use_id else None
        if run is None:
            with durable("use noted"):
                run = client.create_run(experiment_id, run_name=f"{kind} by {own_name}", tags=tags)
        if run.info.status == "FINISHED":
            return
        run_id = run.info.run_id
        if model.model_id and not (run.inputs and run.inputs.model_inputs):
            with durable("use linked"):
                client.log_inputs(run_id, models=[LoggedModelInput(model.model_id)])
        if not run.data.metrics:
            now_ms = time.time_ns() // 1_000_000
            values = [
                Metric(key, value, now_ms, 0, model_id=model.model_id) for key, value in metrics.items()
            ]
            with durable("use measured"):
                client.log_batch(run_id, metrics=values)
        for file in files:
            with durable("artifacts logged"):
                client.log_artifact(run_id, str(file))
        with durable("run ended"):
            client.set_terminated(run_id, "FINISHED")


def is_model_uri(text: str) -> bool:
    """Tell whether a text means a registered model rather than a folder."""
    return text.startswith("models:")


def _fetched(source: str, uri: str, tags: Mapping[str, str], model_id: str | None) -> RegisteredAdapter:
    model = fetch_model(source)
    return RegisteredAdapter(
        folder=model.adapter,
        prompt=model.prompt,
        trained_on=model.trained_on,
        model_uri=uri,
        tags=tags,
        base_model=tags.get("base_model") or model.settings.get("base_model"),
        quantization=tags.get("quantization") or model.settings.get("quantization"),
        model_id=model_id,
    )


def _refuse_without_champion(client: MlflowClient, uri: str, name: str) -> None:
    aliases = client.get_registered_model(name).aliases
    if CHAMPION not in aliases and CHALLENGER in aliases:
        raise InputError(
            uri,
            f"{name} has no champion: none of its versions was better than its base alone; its newest is "
            f"models:/{name}/{aliases[CHALLENGER]}, also models:/{name}@{CHALLENGER}",
        )


def _create_version(
    client: MlflowClient, name: str, model_uri: str, run_id: str, tags: Mapping[str, str]
) -> ModelVersion:
    if not client.search_registered_models(f"name = '{name}'"):
        with durable("registered model created"):
            client.create_registered_model(name)
    model_id = model_uri.removeprefix("models:/")
    with durable("version created"):
        return client.create_model_version(name, model_uri, run_id, tags=dict(tags), model_id=model_id)


def _link(client: MlflowClient, version: ModelVersion, model_uri: str) -> None:
    """Make the logged model's page lead to its version."""
    link = json.dumps([{"name": version.name, "version": version.version}])
    with durable("version linked"):
        client.set_logged_model_tags(model_uri.removeprefix("models:/"), {MLFLOW_MODEL_VERSIONS: link})


def _version_of_run(
    client: MlflowClient, name: str, run_id: str, tags: Mapping[str, str]
) -> ModelVersion | None:
    """Return the version that a run has already; one that never became ready is none."""
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        is_same = version.tags.get("public_perplexity") == tags["public_perplexity"]
        if is_same and version.status == _READY:
            return version
    return None


def _registered(client: MlflowClient, name: str) -> Any:
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code not in (_UNKNOWN, _NO_NAME):
            raise
        problem = "is no registered model; register one with ray_jobs/tune.py"
        raise InputError(f"models:/{name}", problem) from None


def _version(client: MlflowClient, name: str, number: str) -> ModelVersion:
    _registered(client, name)
    try:
        version = client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code != _UNKNOWN:
            raise
        raise InputError(f"models:/{name}/{number}", "is no version of this model") from None
    if version.status != _READY:
        raise InputError(f"models:/{name}/{number}", f"is not ready but {version.status}")
    return version
