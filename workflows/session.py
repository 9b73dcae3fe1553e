"""Owns a command's session: the project's folders, its quiet environment, how it reaches Ray, how it ends.

Exit codes: 0 done, 1 failed, 2 bad input or configuration, 3 stopped but resumable, 4 done but for rows that
failed. Whatever the code, no process of a Ray that was started here is left behind. Imports nothing heavy
until it is needed. Refuses to know any command.
"""

import atexit
import logging
import os
import secrets
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from qlora.config import InputError
from qlora.files import disk_without_space
from qlora.home import PROJECT_ROOT
from tracking.credentials import hide_credentials
from tracking.errors import TrackingAwayError, refusal
from workflows import stopping
from workflows.guardian import guard
from workflows.lock import lost_place
from workflows.ray_quietly import (
    hush_raylets,
    is_on_loopback_only,
    join,
    signals_left_alone,
    without_greeting,
)
from workflows.screens import open_screens

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_ROWS_FAILED = 1, 2, 3, 4
_SAME_COMMAND = "run the same command again"
_SERVERS = ("gcs_server", "raylet")
_SECONDS_TO_END, _SECONDS_BETWEEN_LOOKS, _SECONDS_TO_END_BY_ITSELF = 0.5, 0.5, 10.0
# Ray takes 127.0.0.1 for the machine's address, and listens there, unless it is told that it is no cluster.
_MAY_BE_A_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
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
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class StoppedError(Exception):
    """Work was stopped before its end and can be resumed; the text says how."""


class FailedError(Exception):
    """Work came to its end and did not succeed; the text says why."""


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's main and exit as the contract says.

    An InputError raised on a Ray worker counts as one here. A signal that asks the process to end stops the
    command, as Ctrl-C does, and so do a disk without space and a tracking server that is away. Where nobody
    reads what it prints, it goes on.
    """
    with open_screens():
        _run(main)


def _run(main: Callable[[], None]) -> NoReturn:
    _prepare_environment()
    stopping.catch_signals()
    resume_with(_SAME_COMMAND)
    code, message = 0, ""
    try:
        hide_credentials(os.environ)
        main()
    except InputError as error:
        code, message = EXIT_BAD_INPUT, f"error: {_unwrapped(error)}"
    except StoppedError as error:
        code, message = EXIT_STOPPED, f"stopped: {_unwrapped(error)}"
    except FailedError as error:
        code, message = EXIT_FAILED, f"failed: {_unwrapped(error)}"
    except KeyboardInterrupt:
        code, message = EXIT_STOPPED, f"stopped: by {stopping.signal_name()}; {_resuming[0]}"
    except TrackingAwayError as error:
        if (full := disk_without_space(error)) is not None:  # of a store that is a file
            code, message = EXIT_STOPPED, _no_space(full)
        elif _resuming[0] == _SAME_COMMAND:
            code, message = EXIT_BAD_INPUT, f"error: {error}; start it, or set MLFLOW_TRACKING_URI"
        else:
            code, message = EXIT_STOPPED, f"stopped: {error}; with it back, {_resuming[0]}"
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else EXIT_FAILED
    except Exception as error:
        if (full := disk_without_space(error)) is not None:
            code, message = EXIT_STOPPED, _no_space(full)
        elif (fault := _fault_of_ray(error)) is not None and _resuming[0] != _SAME_COMMAND:
            code, message = EXIT_STOPPED, f"stopped: a process of Ray ended ({fault}); {_resuming[0]}"
        elif (refused := refusal(error)) is not None:
            code, message = EXIT_FAILED, f"failed: the tracking server refuses: {refused}"
        else:
            raise
    finally:
        stopping.end()
        _end_ray()
    _exit(code, message, is_own_process=main.__module__ == "__main__")


_resuming = [_SAME_COMMAND]
_starts_ray: list[bool] = []  # true once Ray's processes may be there, also if it was stopped halfway


def can_go_on(error: BaseException) -> bool:
    """Tell whether work that an error ends is stopped (exit code 3) and not failed."""
    if isinstance(error, KeyboardInterrupt | StoppedError | TrackingAwayError):
        return True
    return disk_without_space(error) is not None or _fault_of_ray(error) is not None


def _no_space(place: str) -> str:
    return f"stopped: no space on {place}; free some, then {_resuming[0]}"


def resume_with(words: str) -> None:
    """Say how this command goes on if it is stopped from here on, as in `run the same command again`."""
    _resuming[0] = words


def go_on() -> None:
    """Raise KeyboardInterrupt if a signal has come, StoppedError if the work can't go on.

    That is so if a server of the local Ray has ended, for which Ray itself would ask for a while and then end
    this process without a word, and if another process has taken the work's place in an object store.
    """
    stopping.go_on()
    if place := lost_place():
        raise StoppedError(f"another process took {place} over, which this one had not reached for a while")
    if dead := _dead_servers():
        raise StoppedError(f"{dead[0]} of the local Ray has ended; {_resuming[0]}")


def _end_without_servers() -> None:
    """End this process some seconds after a server of its Ray, if it hangs in a question to that server."""
    while not (dead := _dead_servers()):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    words = f"stopped: {dead[0]} of the local Ray has ended; {_resuming[0]}"
    time.sleep(_SECONDS_TO_END_BY_ITSELF)
    _end_ray()
    print(words, file=sys.stderr, flush=True)
    os._exit(EXIT_STOPPED)


def _dead_servers() -> list[str]:
    from ray._private import worker

    node: Any = worker._global_node
    if node is None or os.environ.get("RAY_ADDRESS"):
        return []
    try:
        return [kind for kind, _ in node.dead_processes() if kind in _SERVERS]
    except RuntimeError:  # Ray starts or ends a server meanwhile, and counts them; who asks looks again
        return []


def connect_ray() -> dict[str, float]:
    """Join the cluster of $RAY_ADDRESS, or start a local Ray on loopback that asks for this process's token.

    Returns the resources of a local Ray; {} for a cluster, which may grow.
    """
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    _starts_ray.append(True)
    with without_greeting(), signals_left_alone(), stopping.children_outlive_the_terminal():
        if address := os.environ.get("RAY_ADDRESS"):
            join(address, quiet)
        else:
            own_path = filter(None, [os.environ.get("PYTHONPATH")])
            python_path = os.pathsep.join([str(PROJECT_ROOT), *own_path])
            ray.init(
                address="local",
                include_dashboard=False,
                runtime_env={"env_vars": {"PYTHONPATH": python_path}},
                # Those have no such environment, so none of them is ever used; it would be one a core.
                _system_config={"prestart_worker_first_driver": False},
                **quiet,
            )
            node: Any = ray._private.worker._global_node
            guard(node.get_session_dir_path())
            threading.Thread(target=_end_without_servers, name="servers", daemon=True).start()
    stopping.catch_signals()  # Ray's C++ has taken SIGTERM
    stopping.go_on()
    hush_raylets()
    return {} if os.environ.get("RAY_ADDRESS") else ray.cluster_resources()


def _prepare_environment() -> None:
    """Set, before any library is imported, a token for a local Ray, which reads it on import, and quiet.

    Progress bars and advice of libraries would drown our own lines.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    if not address or is_on_loopback_only(address):
        os.environ[_MAY_BE_A_CLUSTER] = "0"
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if not os.environ.get(name):  # Ray would take an empty one for the folder at work
            os.environ.pop(name, None)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for name in ("alembic", "bitsandbytes.backends.cpu.ops", "mlflow", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _end_ray() -> None:
    """Leave a cluster, or end a local Ray with all its processes, some of which would outlive this one."""
    ray = sys.modules.get("ray")
    if ray is None or not (_starts_ray or getattr(ray, "is_initialized", bool)()):
        return
    import psutil

    is_up = ray.is_initialized()  # if not, it was stopped halfway, and has nothing to bring to an end
    started = [] if os.environ.get("RAY_ADDRESS") else psutil.Process().children(recursive=True)
    if is_up and not _dead_servers():  # to whom Ray would say farewell for a minute
        with without_greeting():
            ray.shutdown()
    _, left = psutil.wait_procs(started, timeout=_SECONDS_TO_END if is_up else 0)
    _kill(left)


def _kill(processes: Sequence[Any]) -> None:
    """Kill processes with all below them, suspended first: a raylet may be about to start its agents."""
    import psutil

    suspended, found = set[Any](), set(processes)
    while new := found - suspended:
        suspended |= new
        for process in new:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        for process in new:
            with suppress(psutil.NoSuchProcess):
                found |= set(process.children())
    for process in suspended:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _fault_of_ray(error: BaseException) -> str | None:
    """Say in a line what Ray lost, if that is what an error tells: a process, a node, an object."""
    ray = sys.modules.get("ray")
    if ray is None or not hasattr(ray, "exceptions"):
        return None
    own, tasks = ray.exceptions.RayError, ray.exceptions.RayTaskError
    if not isinstance(error, own) or isinstance(error, tasks):  # what a task raised is a fault of the task
        return None
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _unwrapped(error: Any) -> BaseException:
    """Return what was raised on a worker: Ray wraps it once a process that it passed."""
    while getattr(error, "cause", None) is not None:
        error = error.cause
    return error  # type: ignore[no-any-return]


def _exit(code: int, message: str, is_own_process: bool) -> NoReturn:
    """End with a code and a line.

    A process that ran a command alone does what is registered for its end and no more: taking the libraries
    of a model apart again takes Python 4 to 6 s.
    """
    if message:
        sys.stdout.flush()
        print(message, file=sys.stderr)
    is_without_servers = "ray" in sys.modules and _dead_servers()
    if not (is_without_servers or is_own_process):
        sys.exit(code)
    if not is_without_servers:  # to whom Ray would say farewell for a minute
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # whoever read it may be gone
            stream.flush()
    os._exit(code)
