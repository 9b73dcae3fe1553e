"""Owns the JSON line that every benchmark ends with: figures, settings, versions, hardware, date."""

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def print_report(benchmark: str, ours: float, baseline: float, unit: str, settings: dict[str, Any], *, higher_is_better: bool) -> None:
    """Print the line. `ratio` says how many times faster ours is than the baseline."""
    ratio = ours / baseline if higher_is_better else baseline / ours
    print(json.dumps({
        "benchmark": benchmark, "ours": round(ours, 3), "baseline": round(baseline, 3), "unit": unit, "ratio": round(ratio, 2),
        "settings": settings, "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "hardware": hardware(), "date": datetime.date.today().isoformat()}))


def hardware() -> str:
    """The GPU's name, or the CPU's with its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def synchronize() -> None:
    """Wait for the GPU, if there is one, before reading a clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
