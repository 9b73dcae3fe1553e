"""Owns how a process begins with Ray without Ray's words on the screen or its hands on signals.

Imports nothing heavy until it is needed.
"""

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qlora.config import InputError, first_line
from qlora.home import PROJECT_ROOT, is_in_job

_GREETING = b"Set ray log level"
_TOLD_OTHERWISE = ("ray.kill", "so the task will be retried")  # in what a raylet says
_SECONDS_TO_ANSWER = 5
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_ELSEWHERE = ("192.0.2.1", 80)  # an address that is nobody's (RFC 5737)
_NOT_SENT = ["/.git", "/.venv", "/benchmarks", "/docs", "/exports", "/mlruns", "/results", "/tests"]


def join(address: str, quiet: dict[str, Any]) -> None:
    """Join a cluster; outside a job, which has the project with it, its nodes are sent the project.

    Raises InputError for an address through which commands can't run, and if no cluster is there.
    """
    import ray

    job = "run the command as a job: ray job submit --address http://HEAD:8265 --working-dir . -- python ..."
    if "://" in address:
        raise InputError("RAY_ADDRESS", f"{address} is not a node's address; {job}")
    host, _, port = address.rpartition(":")
    sent = {} if is_in_job() else {"working_dir": str(PROJECT_ROOT), "excludes": _NOT_SENT}
    try:
        if host and port.isdigit():  # Ray itself would try for a minute
            socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_ANSWER).close()
        ray.init(runtime_env=sent, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        mend = f"give the address of a cluster that this machine is a node of, or {job}"
        if "RAY_AUTH_MODE" not in os.environ:  # `ray start` asks for a token where it finds one
            mend = f"if it asks for a token, set RAY_AUTH_MODE=token; otherwise {mend}"
        raise InputError("RAY_ADDRESS", f"{address} can't be joined ({first_line(error)}); {mend}") from None


def is_on_loopback_only(address: str) -> bool:
    """Tell whether a cluster's address is a loopback one, and nothing listens at its port elsewhere.

    Ray would take such an address for this machine's own one, and try that for minutes.
    """
    host, _, port = address.rpartition(":")
    if host not in _LOOPBACK or not port.isdigit():
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(_ELSEWHERE)  # sends nothing: it finds the address that this machine is reached at
            own = sock.getsockname()[0]
            socket.create_connection((own, int(port)), _SECONDS_TO_ANSWER).close()
        except OSError:
            return True
    return False


@contextmanager
def signals_left_alone() -> Iterator[None]:
    """Keep `ray.init`, within, from ending this process at SIGTERM while it starts Ray's processes."""
    from ray._private import utils

    take_sigterm = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = take_sigterm


@contextmanager
def without_greeting() -> Iterator[None]:
    """Keep Ray's greeting off this process's standard error, within: its C++ writes it, past Python."""
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
                if _GREETING not in line:
                    os.write(2, line)


def hush_raylets() -> None:
    """Keep off the screen what a raylet tells of actors that this process has killed, or that start anew.

    A pool that refused its model ends so; a worker that failed is counted, and its end told, by our own.
    """
    from ray._private import worker

    shown = worker.print_to_stdstream

    def show(data: dict[str, Any], ignore_prefix: bool) -> None:
        said = "\n".join(map(str, data["lines"]))
        if not any(words in said for words in _TOLD_OTHERWISE):
            shown(data, ignore_prefix)

    worker.print_to_stdstream = show
