"""Owns a process that outlives a command by a moment, to end what a killed one leaves of its local Ray.

A command that is killed ends nothing any more. Ray's servers go with it, and workers soon after, but its
agents go on for a minute, asking for a server that is gone. They are known by the files that they have open
in the session's folder.

    python workflows/guardian.py < pipe     reads the folder, waits for the pipe's end, which is the command's

Refuses to know Ray.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

_PATH = "GUARDIAN_PATH"
_SECONDS_TO_END, _SECONDS_OF_WATCH = 2.0, 10.0
_guardians: list[subprocess.Popen[str]] = []  # whose pipes end with this process


def guard(folder: str) -> None:
    """Start the guardian of this process, whose local Ray keeps its session in a folder. Returns at once."""
    guardian = subprocess.Popen(
        [sys.executable, "-S", "-E", str(Path(__file__).resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={_PATH: os.pathsep.join(filter(None, sys.path))},
        text=True,
        start_new_session=True,  # a terminal that is closed, or a group that is killed, does not end it
    )
    assert guardian.stdin is not None
    guardian.stdin.write(folder)
    guardian.stdin.flush()
    _guardians.append(guardian)


def main() -> None:
    """Wait for the end of the command, give its processes a moment, and end those that are left."""
    folder = sys.stdin.read()
    sys.path[:0] = os.environ[_PATH].split(os.pathsep)
    import psutil

    began = time.monotonic()
    while folder and time.monotonic() - began < _SECONDS_OF_WATCH:
        left = [process for process in psutil.process_iter() if _is_of(process, folder)]
        if not left:
            return
        for process in left if time.monotonic() - began > _SECONDS_TO_END else ():
            try:
                process.kill()
            except psutil.Error:
                continue
        time.sleep(0.2)


def _is_of(process: object, folder: str) -> bool:
    """Tell whether a process is one of the Ray whose session is in a folder."""
    import psutil

    assert isinstance(process, psutil.Process)
    try:
        command = process.cmdline()
        is_rays = any(one.startswith("ray::") or "/ray/" in one for one in command)
        return is_rays and any(file.path.startswith(f"{folder}/") for file in process.open_files())
    except psutil.Error:
        return False


if __name__ == "__main__":
    main()
