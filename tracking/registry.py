"""Owns the registry of adapters: registering one, the alias `champion`, and models:/ URIs -> an adapter folder.

A version's files are a plain PEFT folder. Refuses to load models.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from qlora.config import InputError
from tracking.runs import connect, tracking_uri

CHAMPION = "champion"
_URI = re.compile(r"models:/([^/@:]+)(?:@([^/@:]+)|/(\d+))")


@dataclass(frozen=True)
class Registration:
    """What became of a registered adapter: its URI and, in words, whether it is the champion and why."""

    model_uri: str
    is_champion: bool
    reason: str


@dataclass(frozen=True)
class RegisteredAdapter:
    """A version of the registry on this machine: its PEFT folder, its fixed URI and its tags."""

    folder: Path
    model_uri: str
    tags: Mapping[str, str]


def register_adapter(name: str, adapter: Path, run_id: str, public_perplexity: float, public_digest: str,
                     facts: Mapping[str, str]) -> Registration:
    """Upload a PEFT folder to its run, register it, and make it champion if it beats the present one.

    Champions are compared on the same public examples only, told by `public_digest`. Registering the same run's adapter
    again changes nothing.
    """
    client = connect()
    tags = {"public_perplexity": repr(public_perplexity), "public_digest": public_digest, **facts}
    version = _version_of_run(client, name, run_id, tags) or _create_version(client, name, adapter, run_id, tags)
    champion = _champion(client, name)
    is_champion, reason = _judge(champion, version, public_perplexity, public_digest)
    if is_champion and (champion is None or champion.version != version.version):
        client.set_registered_model_alias(name, CHAMPION, version.version)
    return Registration(f"models:/{name}/{version.version}", is_champion, reason)


def fetch_adapter(uri: str) -> RegisteredAdapter:
    """The adapter behind models:/NAME@ALIAS or models:/NAME/VERSION. Raises InputError if there is none."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise InputError(uri, "must read models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    client = connect()
    try:
        version = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
        folder = Path(download_artifacts(artifact_uri=_source(version), tracking_uri=tracking_uri()))
    except MlflowException as error:
        raise InputError(uri, f"can't be had from {_without_password(tracking_uri())}: {error.message}; "
                         "register one with ray_jobs/tune.py or set MLFLOW_TRACKING_URI") from error
    return RegisteredAdapter(folder, f"models:/{name}/{version.version}", version.tags)


def is_model_uri(text: str) -> bool:
    """Whether a text means a registered model rather than a folder."""
    return text.startswith("models:")


def _create_version(client: MlflowClient, name: str, adapter: Path, run_id: str, tags: Mapping[str, str]) -> ModelVersion:
    if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name)
    client.log_artifacts(run_id, str(adapter), "adapter")
    source = f"{client.get_run(run_id).info.artifact_uri}/adapter"
    return client.create_model_version(name, source, run_id, tags=dict(tags))


def _version_of_run(client: MlflowClient, name: str, run_id: str, tags: Mapping[str, str]) -> ModelVersion | None:
    versions = client.search_model_versions(f"name = '{name}'")
    return next((v for v in versions if v.run_id == run_id and v.tags.get("public_perplexity") == tags["public_perplexity"]), None)


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    return client.get_model_version(name, str(number)) if number else None


def _judge(champion: ModelVersion | None, version: ModelVersion, perplexity: float, digest: str) -> tuple[bool, str]:
    if champion is None:
        return True, "the first version of this model"
    if champion.version == version.version:
        return True, "it is the champion already"
    if champion.tags.get("public_digest") != digest:
        return False, (f"champion version {champion.version} was measured on other public examples; "
                       "measure both on one file with ray_jobs/evaluate.py")
    theirs = float(champion.tags["public_perplexity"])
    words = f"public perplexity {perplexity:.4g} against {theirs:.4g} of version {champion.version}"
    return perplexity < theirs, words


def _source(version: ModelVersion) -> str:
    if version.source is None:
        raise InputError(f"models:/{version.name}/{version.version}", "has no files; register it again")
    return version.source


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)
