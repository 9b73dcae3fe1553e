"""Owns the last lines of a sweep: what was found and where to look.

Loads nothing heavy, so that a finished sweep answers at once.
"""

from collections.abc import Mapping
from typing import Any

from qlora.cost import Cost, Costs
from qlora.home import RESULTS, in_results
from tracking.links import comparison_link, pages_root, run_link, trials_link, version_link
from workflows.sweep.folder import SweepFolder

PRICE = "price_per_gpu_hour"


def closing_words(sweep: SweepFolder, summary: Mapping[str, Any]) -> str:
    """Say what was found and where to look, for the end of the screen."""
    best, champion = summary["best"], summary["champion"]
    verdict = "now champion" if champion["is_champion"] else "not champion"
    model = f"models:/{sweep.model_name}@champion" if champion["is_champion"] else best["model_uri"]
    lines = [
        f"best        {_named(best)}: {_judged(summary)}public perplexity {best['public_perplexity']:.4f}, "
        f"zero-shot {summary['zero_shot']:.4f}",
        f"registered  {best['model_uri']}, {verdict}: {champion['reason']}",
        *(f"{name:<11} {line}" for name, line in cost_lines(summary).items()),
        f"adapter     {_shown(best['checkpoint'])} (a PEFT folder)",
        f"report      {in_results(sweep.name, 'report.html')}, summary.json beside it",
        *(f"{name:<11} {link}" for name, link in summary_links(summary, pages_root()).items()),
        f"generate    python ray_jobs/batch_infer.py --model {model} --input FILE --output FILE",
    ]
    if pages_root().startswith("http://127.0.0.1:5000"):
        lines.insert(-1, "            (make ui serves these pages)")
    return "\n".join(lines)


def cost_lines(summary: Mapping[str, Any]) -> dict[str, str]:
    """Write what GPUs cost, by what lines begin with; nothing for a sweep on CPUs, or from before."""
    found = summary.get("cost")
    if not found:
        return {}
    price = found[PRICE]
    return Costs(Cost(found["gpu_seconds"], price), Cost(found["planned_gpu_seconds"], price)).lines


def _judged(summary: Mapping[str, Any]) -> str:
    """Say what the best adapter has of an objective that is not public perplexity."""
    best = summary["best"]
    if "objective" not in best:
        return ""
    return f"{summary['metric']} {best['objective']:.4g}, zero-shot {best['zero_shot_objective']:.4g}; "


def _named(best: Mapping[str, Any]) -> str:
    if best["trial_id"] is None and len(best["trial_ids"]) == 1:
        return f"average of two checkpoints of trial {best['trial_ids'][0]}"
    if best["trial_id"] is None:
        return f"average of trials {', '.join(best['trial_ids'])}"
    return f"trial {best['trial_id']}"


def _shown(checkpoint: str) -> str:
    """Return a path from the home as people are shown it."""
    return in_results(*checkpoint.split("/")[1:]) if checkpoint.startswith(f"{RESULTS}/") else checkpoint


def summary_links(summary: Mapping[str, Any], root: str) -> dict[str, str]:
    """Return where MLflow's pages show what a sweep found.

    A page that a summary from before does not name is left out.
    """
    experiment, view = summary.get("mlflow_experiment_id"), summary.get("mlflow_view")
    links: dict[str, str | None] = {}
    best = "best_objective" if "objective" in summary["best"] else "best_public_perplexity"
    if experiment is not None:
        links = {
            "trials": trials_link(experiment, root, best, more_is_better=summary.get("mode") == "max"),
            "compare": comparison_link(experiment, view, root) if view else None,
            "sweep": run_link(experiment, summary["mlflow_run_id"], root),
        }
    links["version"] = version_link(summary["best"]["model_uri"], root)
    return {name: link for name, link in links.items() if link}
