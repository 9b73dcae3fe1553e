"""Owns links into MLflow's pages: addresses that open on what people compare, for whatever server is used.

`root`: where the pages are (`pages_root`), or "" for a link within them.
"""

import json
import os
import re
import urllib.parse
from collections.abc import Sequence

_LOCAL_PAGES = "http://127.0.0.1:5000/"  # where `make ui` serves the embedded store
_BEST = "metrics.`best_public_perplexity`"


def pages_root() -> str:
    """Return where MLflow's pages are.

    That is the tracking server's address, without a password, or that of `make ui`.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return (
        f"{without_password(uri).rstrip('/')}/" if uri.startswith(("http://", "https://")) else _LOCAL_PAGES
    )


def trials_link(experiment_id: str, root: str) -> str:
    """Return the page that draws an experiment's runs as charts, best first."""
    query = urllib.parse.urlencode(
        {
            "workflowType": "machine_learning",
            "orderByKey": _BEST,
            "orderByAsc": "true",
            "compareRunsMode": "CHART",
        }
    )
    return f"{root}#/experiments/{experiment_id}/runs?{query}"


def comparison_link(experiment_id: str, run_ids: Sequence[str], root: str) -> str:
    """Return the page that compares runs over their parameters and metrics."""
    query = urllib.parse.urlencode(
        {"runs": json.dumps(list(run_ids)), "experiments": json.dumps([experiment_id])}
    )
    return f"{root}#/compare-runs?{query}"


def run_link(experiment_id: str, run_id: str, root: str) -> str:
    """Return the page of a run."""
    return f"{root}#/experiments/{experiment_id}/runs/{run_id}"


def version_link(model_uri: str, root: str) -> str:
    """Return the page of a registered version, models:/NAME/VERSION."""
    name, _, number = model_uri.removeprefix("models:/").rpartition("/")
    return f"{root}#/models/{urllib.parse.quote(name)}/versions/{number}"


def without_password(uri: str) -> str:
    """Return an address without the name and password that it may hold."""
    return re.sub(r"//[^/@]*@", "//", uri)
