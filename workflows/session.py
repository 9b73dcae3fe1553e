"""Owns a command's session: the project's folders, its quiet environment, how it reaches Ray, how it ends.

Exit codes: 0 done, 2 bad input or configuration, 3 stopped but resumable, 4 done but for rows that failed.
Imports nothing heavy until it is needed. Refuses to know any command.
"""

import logging
import os
import secrets
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from qlora.config import InputError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
RESULTS_FOLDER = PROJECT_ROOT / "results"
EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_ROWS_FAILED = 2, 3, 4
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class StoppedError(Exception):
    """Work was stopped before its end and can be resumed; the text says how."""


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's main and exit as the contract says.

    An InputError raised on a Ray worker counts as one here.
    """
    _prepare_environment()
    try:
        main()
    except (InputError, StoppedError) as error:
        cause: Any = error
        # Ray wraps it once a process that it passed
        while getattr(cause, "cause", None) is not None:
            cause = cause.cause
        _exit(EXIT_BAD_INPUT if isinstance(cause, InputError) else EXIT_STOPPED, cause)
    except KeyboardInterrupt:
        _exit(
            EXIT_STOPPED,
            "stopped by the keyboard; run the same command again, with --resume where it has that option",
        )
    sys.exit(0)


def connect_ray() -> dict[str, float]:
    """Join the cluster of $RAY_ADDRESS, or start a local Ray on loopback that asks for this process's token.

    Returns the resources of a local Ray; {} for a cluster, which may grow.
    """
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return {}
    python_path = os.pathsep.join([str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(
        address="local",
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": python_path}},
    )
    return ray.cluster_resources()


def _prepare_environment() -> None:
    """Set, before any library is imported, a token for a local Ray, which reads it on import, and quiet.

    Progress bars and advice of libraries would drown our own lines.
    """
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for name in ("alembic", "mlflow", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _exit(code: int, message: object) -> NoReturn:
    print(f"error: {message}" if code == EXIT_BAD_INPUT else f"stopped: {message}", file=sys.stderr)
    sys.exit(code)
