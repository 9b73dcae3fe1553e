"""Owns links into MLflow's pages: addresses that open on what people compare, for whatever server is used.

`root`: where the pages are (`pages_root`), or "" for a link within them. Every link names the workflow, since
MLflow's pages open on generative AI by themselves.
"""

import os
import urllib.parse

from qlora.addresses import without_password

_LOCAL_PAGES = "http://127.0.0.1:5000/"  # where `make ui` serves the embedded store
_TRAINING = {"workflowType": "machine_learning"}
_CHARTS = {**_TRAINING, "compareRunsMode": "CHART"}


def pages_root() -> str:
    """Return where MLflow's pages are.

    That is the tracking server's address, without a password, or that of `make ui`.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    is_server = uri.startswith(("http://", "https://"))
    return f"{without_password(uri).rstrip('/')}/" if is_server else _LOCAL_PAGES


def trials_link(
    experiment_id: str, root: str, best: str = "best_public_perplexity", *, more_is_better: bool = False
) -> str:
    """Return the page that draws an experiment's runs as charts, best first by a metric."""
    order = {"orderByKey": f"metrics.`{best}`", "orderByAsc": "false" if more_is_better else "true"}
    return f"{root}#/experiments/{experiment_id}/runs?{urllib.parse.urlencode({**_CHARTS, **order})}"


def comparison_link(experiment_id: str, view: str, root: str) -> str:
    """Return the page that compares a sweep's trials over the searched settings; see tracking.views."""
    query = urllib.parse.urlencode({**_CHARTS, "viewStateShareKey": view})
    return f"{root}#/experiments/{experiment_id}/runs?{query}"


def run_link(experiment_id: str, run_id: str, root: str) -> str:
    """Return the page of a run."""
    return f"{root}#/experiments/{experiment_id}/runs/{run_id}?{urllib.parse.urlencode(_TRAINING)}"


def version_link(model_uri: str, root: str) -> str:
    """Return the page of a registered version, models:/NAME/VERSION."""
    name, _, number = model_uri.removeprefix("models:/").rpartition("/")
    page = f"#/models/{urllib.parse.quote(name)}/versions/{number}"
    return f"{root}{page}?{urllib.parse.urlencode(_TRAINING)}"
