"""Owns where the home is that results/ and the embedded store hang off, and whether this process is a job's.

$QLORA_HOME names it: a folder, or a URI that pyarrow knows, such as s3://BUCKET/PATH. Without it the home is
the project's folder. A submitted job runs in a copy of that folder, which is lost with the job, so there the
home has to be named.

Refuses to know what is kept there.
"""

import os
from pathlib import Path

from qlora.addresses import holds_credentials
from qlora.config import InputError
from qlora.files import below

PROJECT_ROOT = Path(__file__).resolve().parent.parent
HOME = "QLORA_HOME"
RESULTS = "results"
_OF_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # which Ray gives to the command of a submitted job


def is_in_job() -> bool:
    """Tell whether this process is the command of a submitted job, or was started by it."""
    return _OF_A_JOB in os.environ


def home() -> str:
    """Return the home, an absolute path or a URI.

    Raises InputError in a job that was not told it, and there for a path that its copy would be asked for;
    also for an address with a key in it, which people would be shown, and for a file.
    """
    named = os.environ.get(HOME, "")
    if "://" in named:
        check_no_credentials(named, HOME)
        return named
    folder = expanded(named)
    if is_in_job() and not folder.is_absolute():
        problem = "must be an absolute path" if named else "is not set"
        raise InputError(
            HOME,
            f"{problem}: a job's own folder is lost with it; name s3://BUCKET/PATH, or a folder of the head "
            'node, by --runtime-env-json \'{"env_vars": {"QLORA_HOME": "..."}}\'',
        )
    if named and folder.exists() and not folder.is_dir():
        raise InputError(HOME, f"{named} is a file; name a folder")
    return str(folder.absolute()) if named else str(PROJECT_ROOT)


def check_no_credentials(place: str, where: str) -> None:
    """Raise InputError for an address that would tell secrets on the screen and in runs."""
    if holds_credentials(place):
        problem = "holds a name, a password or a key; give them in the environment of all nodes"
        raise InputError(where, problem)


def expanded(name: str) -> Path:
    """Return a path with its user's home in place of ~; as it is if there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def home_folder() -> Path | None:
    """Return the home if it is a folder; None for a URI. Raises InputError as `home` does."""
    place = home()
    return None if "://" in place else Path(place)


def home_place(*names: str) -> str:
    """Return the path or URI of what is below the home. Raises InputError as `home` does."""
    return below(home(), *names)


def in_results(*names: str) -> str:
    """Return what people are shown for results/, or a place below it: short in the project's folder."""
    short = "/".join((RESULTS, *names))
    return short if home() == str(PROJECT_ROOT) else home_place(RESULTS, *names)
