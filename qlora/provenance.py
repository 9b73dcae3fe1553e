"""Owns what a result says of where it came from: package versions, the project's commit, the hardware."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "ray", "mlflow")
_ROOT = Path(__file__).resolve().parent.parent


def package_versions() -> dict[str, str]:
    """Of the packages that results depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def git_commit() -> str | None:
    """The project's commit, with `+changes` if files differ from it; None outside a git repository, as in a job's copy."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changes else commit


def hardware(kind: str) -> str:
    """The name of this process's GPU (`cuda`), or the CPU's with its number of cores."""
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_name()
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
