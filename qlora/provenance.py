"""Owns what a result says about its origin: package versions, the project's commit, the hardware.

A number without these can't be reproduced. Refuses to know what the result is.
"""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "ray", "mlflow")
_ROOT = Path(__file__).resolve().parent.parent


def package_versions() -> dict[str, str]:
    """Return the installed version of each package that results depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def git_commit() -> str | None:
    """Return the project's commit, with `+changes` if tracked files differ from it.

    Return None outside a git repository, as in the copy of the project that a job runs in.
    """
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changes else commit


def hardware(kind: str) -> str:
    """Return the name of this process's GPU if `kind` is `cuda`, else the CPU's with its number of cores."""
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_name()
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores"


def _git(*words: str) -> str:
    """Return what a git command prints.

    Raises OSError without git, CalledProcessError if the command fails.
    """
    command = ["git", "-C", str(_ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
