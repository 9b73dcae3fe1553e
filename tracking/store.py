"""Owns the way to the tracking store: a client, and one error for a server that gives no answer.

Refuses to know what is kept there.
"""

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import requests
import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Param, Run
from mlflow.exceptions import MlflowException

from qlora.addresses import without_password
from qlora.config import InputError
from qlora.failpoints import durable
from qlora.files import disk_without_space
from tracking.address import (
    address,
    artifacts_folder,
    away,
    check_addresses,
    reach_database,
    registry_uri,
    sqlite_file,
    tracking_uri,
)
from tracking.credentials import hide_credentials
from tracking.errors import TrackingAwayError
from tracking.moved_store import follow_artifacts

PARENT = "mlflow.parentRunId"
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # how MLflow's pages know what to open with
# A refused connection is given up after 12 to 15 s (0 + 4 + 8 s and jitter); by default after 247 s.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
_QUIET = "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"  # "View run ... at ...", and a request for each such line
_UNAUTHORISED = (401, 403)


def connect() -> MlflowClient:
    """Return a client of the tracking server, whose schema is created or migrated on first use.

    Raises TrackingAwayError for a database that can't be reached.
    """
    hide_credentials(os.environ)
    for variable, value in _PATIENCE.items():
        os.environ.setdefault(variable, value)
    os.environ.setdefault(_QUIET, "true")
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it raises what it logs
    uri = tracking_uri()
    if file := sqlite_file(uri):
        _make_folder(file.absolute().parent)
    with asking():
        check_addresses()
        reach_database(uri)
        if file:
            _follow_artifacts(file.absolute())
        if mlflow.get_tracking_uri() != uri:
            mlflow.set_tracking_uri(uri)  # for what MLflow calls in itself
        return MlflowClient(tracking_uri=uri, registry_uri=registry_uri())


@functools.cache
def _follow_artifacts(file: Path) -> None:
    """Have a store that was moved lead to its artifacts, once in a process."""
    follow_artifacts(file, artifacts_folder())


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if disk_without_space(error):
            raise
        problem = f"can't be a folder for the tracking store: {error.strerror}"
        raise InputError(folder, f"{problem}; set QLORA_HOME or MLFLOW_TRACKING_URI") from None


@contextmanager
def asking() -> Iterator[None]:
    """Ask the tracking server within; also a decorator.

    Raises TrackingAwayError where it gives no answer, InputError where it refuses name and password. No text
    of an error has a password in it.
    """
    try:
        yield
    except (InputError, TrackingAwayError):
        raise
    except Exception as error:
        if reason := _why_away(error):
            raise away(reason) from None
        if not isinstance(error, MlflowException):
            raise
        if error.get_http_status_code() in _UNAUTHORISED:
            problem = "refuses name and password; see MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            raise InputError(address(), problem) from None
        if without_password(str(error)) != str(error):
            raise MlflowException(without_password(str(error))) from None
        raise


def ensure_experiment(client: MlflowClient, name: str) -> str:
    """Return the id of an experiment, created if need be, whose pages open on runs.

    A local store keeps artifacts beside its file.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        local = tracking_uri().startswith("sqlite:")
        artifacts = artifacts_folder().as_uri() if local else None
        with durable("experiment created"):
            return client.create_experiment(name, artifact_location=artifacts, tags=_KIND)
    for key, value in _KIND.items():
        if key not in found.tags:
            with durable("experiment created"):
                client.set_experiment_tag(found.experiment_id, key, value)
    return found.experiment_id


def find_run(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> Run | None:
    """Return the oldest run with these tags."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    order = ["attributes.start_time ASC"]
    found = client.search_runs([experiment_id], query, max_results=1, order_by=order)
    return found[0] if found else None


def children(client: MlflowClient, experiment_id: str, parent_run_id: str, more: str = "") -> list[Run]:
    """Return the child runs of a run, oldest first. `more`: a condition besides, in MLflow's words."""
    query, order = f"tags.`{PARENT}` = '{parent_run_id}'{more}", ["attributes.start_time ASC"]
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], query, order_by=order, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def params(parameters: Mapping[str, Any]) -> list[Param]:
    """Return parameters as MLflow takes them."""
    return [Param(key, str(value)[:6000]) for key, value in parameters.items()]


def _why_away(error: BaseException) -> str | None:
    """Say why no server answered, if that is what an error comes from."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, requests.exceptions.RetryError):
            return "it answers with errors only"
        if isinstance(cause, requests.exceptions.ConnectionError | requests.exceptions.Timeout):
            told = [one.strerror for one in causes if isinstance(one, OSError) and one.strerror]
            return told[-1] if told else "it gives no answer"
        if isinstance(cause, sqlalchemy.exc.OperationalError):
            return str(cause.orig)
        if type(cause).__name__ in ("EndpointConnectionError", "ConnectTimeoutError"):  # of the S3 client
            return str(cause)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
