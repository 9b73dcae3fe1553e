"""Owns the JSON line that every benchmark ends with: figures, settings, versions, hardware, date."""

import datetime
import json
from typing import Any

import torch

from qlora.provenance import hardware, package_versions


def print_report(
    benchmark: str,
    ours: float,
    baseline: float | None,
    unit: str,
    settings: dict[str, Any],
    *,
    higher_is_better: bool,
) -> None:
    """Print the line. `ratio` says how many times faster ours is than the baseline.

    `baseline`: None if it can't do the work or was not asked to; then the ratio is null, too.
    """
    ratio = None
    if baseline is not None:
        ratio = round(ours / baseline if higher_is_better else baseline / ours, 2)
    print(
        json.dumps(
            {
                "benchmark": benchmark,
                "ours": _rounded(ours),
                "baseline": None if baseline is None else _rounded(baseline),
                "unit": unit,
                "ratio": ratio,
                "settings": settings,
                "versions": package_versions(),
                "hardware": hardware("cuda" if torch.cuda.is_available() else "cpu"),
                "date": datetime.date.today().isoformat(),
            }
        )
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def synchronize() -> None:
    """Wait for the GPU, if there is one, before reading a clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
