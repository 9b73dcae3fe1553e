"""Owns a command's session: the project's folders, its quiet environment, how it reaches Ray, how it ends.

Exit codes: 0 done, 1 failed, 2 bad input or configuration, 3 stopped but resumable, 4 done but for rows that
failed. Imports nothing heavy until it is needed. Refuses to know any command.
"""

import logging
import os
import secrets
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from qlora.config import InputError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
RESULTS_FOLDER = PROJECT_ROOT / "results"
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_ROWS_FAILED = 1, 2, 3, 4
_GREETING, _PLANNED_KILL = b"Set ray log level", "ray.kill"
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
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


class FailedError(Exception):
    """Work came to its end and did not succeed; the text says why."""


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's main and exit as the contract says.

    An InputError raised on a Ray worker counts as one here.
    """
    _prepare_environment()
    try:
        main()
    except InputError as error:
        cause: Any = error
        while getattr(cause, "cause", None) is not None:  # Ray wraps it once a process that it passed
            cause = cause.cause
        _exit(EXIT_BAD_INPUT, f"error: {cause}")
    except StoppedError as error:
        _exit(EXIT_STOPPED, f"stopped: {error}")
    except FailedError as error:
        _exit(EXIT_FAILED, f"failed: {error}")
    except KeyboardInterrupt:
        words = "by the keyboard; run the same command again, with --resume where it has that option"
        _exit(EXIT_STOPPED, f"stopped: {words}")
    sys.exit(0)


def connect_ray() -> dict[str, float]:
    """Join the cluster of $RAY_ADDRESS, or start a local Ray on loopback that asks for this process's token.

    Returns the resources of a local Ray; {} for a cluster, which may grow.
    """
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _without_lines(_GREETING):
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            own_path = filter(None, [os.environ.get("PYTHONPATH")])
            python_path = os.pathsep.join([str(PROJECT_ROOT), *own_path])
            ray.init(
                address="local",
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                runtime_env={"env_vars": {"PYTHONPATH": python_path}},
                **quiet,
            )
    _hush_planned_kills()
    return {} if os.environ.get("RAY_ADDRESS") else ray.cluster_resources()


@contextmanager
def _without_lines(unwanted: bytes) -> Iterator[None]:
    """Keep lines with these words off this process's standard error.

    Libraries of other languages write them, past Python.
    """
    sys.stderr.flush()
    screen = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(screen, 2)
            os.close(screen)
            said.seek(0)
            for line in said:
                if unwanted not in line:
                    os.write(2, line)


def _hush_planned_kills() -> None:
    """Keep off the screen what a raylet tells of actors that this process has killed.

    A pool that refused its model ends so.
    """
    from ray._private import worker

    shown = worker.print_to_stdstream

    def show(data: dict[str, Any], ignore_prefix: bool) -> None:
        if not any(_PLANNED_KILL in str(line) for line in data["lines"]):
            shown(data, ignore_prefix)

    worker.print_to_stdstream = show


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


def _exit(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
