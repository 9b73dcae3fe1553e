"""Owns the view in which MLflow's pages compare a sweep's trials: settings and perplexity, then curves.

MLflow keeps a shared view as a tag of its experiment, in the words of its own pages (3.17), and a link names
the tag.
"""

import json
from collections.abc import Sequence
from typing import Any

from qlora.failpoints import durable
from tracking.store import asking, connect
from tracking.trial_runs import STAGES

_TAG = "mlflow.sharedViewState."
_SETTINGS, _CURVES = "settings", "curves"


@asking()
def save_comparison(
    experiment_id: str,
    sweep: str,
    parent_run_id: str,
    settings: Sequence[str],
    objective: str = "public perplexity",
    *,
    more_is_better: bool = False,
) -> str:
    """Save the view that compares the trials of a sweep over some settings; returns its name, for a link.

    `objective`: what people call what trials are compared by.
    """
    name = f"sweep-{parent_run_id}"
    metric = "public_perplexity" if objective == "public perplexity" else "objective"
    best = f"best_{metric}"
    params = [STAGES if setting == "epochs" else setting for setting in settings]
    axes = {"selectedParams": params, "selectedMetrics": [best], "showAllRuns": True}
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent_run_id}'",
        "orderByKey": f"metrics.`{best}`",
        "orderByAsc": not more_is_better,
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,  # sections stay in this order
        "compareRunSections": [
            _section(_SETTINGS, f"Sweep {sweep}: settings and best {objective}", columns=1),
            _section(_CURVES, "Curves over optimizer steps", columns=3),
        ],
        "compareRunCharts": [
            _chart("PARALLEL", _SETTINGS, "axes", **axes),
            _chart("BAR", _CURVES, "best", metricKey=best),
            *(_line(one) for one in dict.fromkeys([metric, "public_perplexity", "training_loss"])),
        ],
    }
    client = connect()
    with durable("view saved"):
        client.set_experiment_tag(experiment_id, f"{_TAG}{name}", json.dumps(state))
    return name


def _section(section: str, name: str, columns: int) -> dict[str, Any]:
    return {
        "uuid": section,
        "name": name,
        "columns": columns,
        "cardHeight": 360,
        "display": True,
        "isReordered": False,
        "deleted": False,
        "isGenerated": False,
    }


def _line(metric: str) -> dict[str, Any]:
    return _chart("LINE", _CURVES, metric, metricKey=metric, selectedMetricKeys=[metric])


def _chart(kind: str, section: str, name: str, **settings: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": f"{section}-{name}",
        "metricSectionId": section,
        "runsCountToCompare": 20,
        "deleted": False,
        "isGenerated": False,
        **settings,
    }
