"""Owns the registry of adapters: versions of a registered model, their aliases, models:/ URIs -> adapters.

`challenger` is the newest version; `champion` is the best on the public examples it was measured on, until it
is told otherwise; earlier champions are remembered, for the way back. Refuses to load models.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from qlora.config import InputError
from tracking.links import without_password
from tracking.logged_model import fetch_model
from tracking.runs import connect, ensure_experiment, tracking_uri

CHAMPION, CHALLENGER = "champion", "challenger"
_URI = re.compile(r"models:/(?:(m-[0-9a-f]+)|([^/@:]+)(?:@([^/@:]+)|/(\d+)))")
_HISTORY = "champions"


@dataclass(frozen=True)
class Registration:
    """The outcome of a registration: its URI and, in words, whether it is the champion and why."""

    model_uri: str
    is_champion: bool
    reason: str


@dataclass(frozen=True)
class RegisteredAdapter:
    """A version of the registry on this machine.

    folder: its PEFT folder. prompt: the file of the prompt that it was trained with. model_uri: its fixed
    URI. base_model, quantization: what it is served on. model_id: of its logged model, if it has one.
    """

    folder: Path
    prompt: Path | None
    model_uri: str
    tags: Mapping[str, str]
    base_model: str | None
    quantization: str | None
    model_id: str | None


def register(
    name: str,
    model_uri: str,
    run_id: str,
    public_perplexity: float,
    public_digest: str,
    facts: Mapping[str, str],
) -> Registration:
    """Make a logged model the newest version of a registered one, and champion if it beats the present one.

    Champions are compared on the same public examples, told by `public_digest`, and with the same tokenizer
    (fact `tokenizer_digest`) only, and have to beat the base alone (fact `zero_shot_public_perplexity`).
    Registering the same run's adapter again changes nothing.
    """
    client = connect()
    tags = {"public_perplexity": repr(public_perplexity), "public_digest": public_digest, **facts}
    version = _version_of_run(client, name, run_id, tags)
    version = version or _create_version(client, name, model_uri, run_id, tags)
    client.set_registered_model_alias(name, CHALLENGER, version.version)
    return _crowned_if_better(client, name, version)


def promote(name: str, number: str) -> Registration:
    """Make a version champion if it is better than the present one.

    Raises InputError for an unknown version.
    """
    client = connect()
    return _crowned_if_better(client, name, _version(client, name, number))


def roll_back(name: str) -> Registration:
    """Give the alias back to the champion before the present one. Raises InputError if there was none."""
    client = connect()
    _registered(client, name)
    champion, history = _champion(client, name), _history(client, name)
    if champion is not None and str(champion.version) not in history[-1:]:
        history.append(str(champion.version))  # the alias was set by other means
    if len(history) < 2:
        raise InputError(f"models:/{name}", "had no champion before the present one")
    client.set_registered_model_tag(name, _HISTORY, json.dumps(history[:-1]))
    client.set_registered_model_alias(name, CHAMPION, history[-2])
    result = Registration(f"models:/{name}/{history[-2]}", True, f"rolled back from version {history[-1]}")
    _describe(client, name, _version(client, name, history[-2]), result)
    _describe_dethroned(client, name, champion, history[-2])
    return result


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
        ) from error


def note_use(
    model: RegisteredAdapter,
    kind: str,
    facts: Mapping[str, Any],
    metrics: Mapping[str, float],
    files: Sequence[Path] = (),
) -> None:
    """Log a finished run of kind `evaluation` or `prediction`, linked to the version that made it."""
    client = connect()
    name = model.model_uri.removeprefix("models:/").partition("/")[0]
    tags = {
        "kind": kind,
        "model_uri": model.model_uri,
        **{key: str(one)[:5000] for key, one in facts.items()},
    }
    run = client.create_run(
        ensure_experiment(client, name),
        run_name=f"{kind} by {model.model_uri.removeprefix('models:/')}",
        tags=tags,
    )
    if model.model_id:
        client.log_inputs(run.info.run_id, models=[LoggedModelInput(model.model_id)])
    for key, value in metrics.items():
        client.log_metric(run.info.run_id, key, value, model_id=model.model_id)
    for file in files:
        client.log_artifact(run.info.run_id, str(file))
    client.set_terminated(run.info.run_id, "FINISHED")


def is_model_uri(text: str) -> bool:
    """Tell whether a text means a registered model rather than a folder."""
    return text.startswith("models:")


def _fetched(source: str, uri: str, tags: Mapping[str, str], model_id: str | None) -> RegisteredAdapter:
    model = fetch_model(source)
    return RegisteredAdapter(
        folder=model.adapter,
        prompt=model.prompt,
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
    if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name)
    model_id = model_uri.removeprefix("models:/")
    version = client.create_model_version(name, model_uri, run_id, tags=dict(tags), model_id=model_id)
    link = json.dumps([{"name": name, "version": version.version}])
    client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: link})
    return version


def _version_of_run(
    client: MlflowClient, name: str, run_id: str, tags: Mapping[str, str]
) -> ModelVersion | None:
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.run_id == run_id and version.tags.get("public_perplexity") == tags["public_perplexity"]:
            return version
    return None


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
        _describe_dethroned(client, name, champion, str(version.version))
    result = Registration(f"models:/{name}/{version.version}", is_champion, reason)
    _describe(client, name, version, result)
    return result


def _judge(champion: ModelVersion | None, version: ModelVersion) -> tuple[bool, str]:
    """Decide whether a version becomes (or stays) champion; returns that and why."""
    if champion is not None and champion.version == version.version:
        return True, "it is the champion already"
    if "public_perplexity" not in version.tags:
        return False, "no public perplexity is known of it; register adapters with ray_jobs/tune.py"
    ours = float(version.tags["public_perplexity"])
    zero_shot = float(version.tags.get("zero_shot_public_perplexity", "inf"))
    if not ours < zero_shot:
        return (
            False,
            f"public perplexity {ours:.4g} is no better than the base alone, which has {zero_shot:.4g}",
        )
    if champion is None:
        return True, "the first champion of this model"
    if champion.tags.get("public_digest") != version.tags.get("public_digest"):
        return False, (
            f"champion version {champion.version} was measured on other public examples; "
            "measure both on one file with ray_jobs/evaluate.py"
        )
    if not _same_tokenizer(champion, version):
        return False, (
            f"champion version {champion.version} has another tokenizer, and a perplexity per token means "
            "nothing across tokenizers; compare texts, with ray_jobs/batch_infer.py"
        )
    theirs = float(champion.tags["public_perplexity"])
    return ours < theirs, f"public perplexity {ours:.4g} against {theirs:.4g} of version {champion.version}"


def _same_tokenizer(one: ModelVersion, other: ModelVersion) -> bool:
    """Tell whether two versions read text alike; versions that don't say have to have the same base."""
    digests = [version.tags.get("tokenizer_digest") for version in (one, other)]
    if None not in digests:
        return digests[0] == digests[1]
    return one.tags.get("base_model") == other.tags.get("base_model")


def _describe_dethroned(client: MlflowClient, name: str, before: ModelVersion | None, successor: str) -> None:
    if before is not None:
        reason = f"version {successor} took its place"
        _describe(client, name, before, Registration(f"models:/{name}/{before.version}", False, reason))


def _describe(client: MlflowClient, name: str, version: ModelVersion, result: Registration) -> None:
    """Write a version's description: verdict, figures, usage."""
    tags, uri = version.tags, result.model_uri
    verdict = f"{'Champion' if result.is_champion else 'Not champion'}: {result.reason}."
    figures = f"Public perplexity **{float(tags.get('public_perplexity', 'nan')):.5g}**"
    if "zero_shot_public_perplexity" in tags:
        figures += f", the base alone {float(tags['zero_shot_public_perplexity']):.5g}"
    usage = (
        f"```\npython ray_jobs/batch_infer.py --model {uri} --input FILE --output FILE\n"
        f"python ray_jobs/evaluate.py --adapter {uri} --data FILE --output FILE\n```"
    )
    base = tags.get("base_model", "-")
    trained = f"Base `{base}` in {tags.get('quantization', '-')}, prompt `{tags.get('prompt', '-')}`, "
    trained += f"sweep `{tags.get('sweep', '-')}`, trial `{tags.get('trial_id', '-')}`."
    description = "\n\n".join([verdict, f"{figures}.", trained, usage])
    client.update_model_version(name, version.version, description)
