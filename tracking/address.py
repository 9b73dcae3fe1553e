"""Owns where the tracking store is, and that it is found before work starts if it can't be reached.

Loads neither MLflow nor, unless the store is a database, anything of one.

Refuses to know what is kept there.
"""

import contextlib
import functools
import os
import re
import sqlite3
import time
from pathlib import Path
from typing import Any

from qlora.addresses import without_password
from qlora.config import InputError
from qlora.home import home, home_folder
from tracking.credentials import hide_credentials
from tracking.errors import TrackingAwayError

_SERVERS, _SQLITE, _DATABRICKS = ("http", "https"), "sqlite", ("databricks", "databricks-uc", "uc")
_DATABASES = ("postgresql", "mysql", "mssql")
_SQLITE_FILE = re.compile(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?")
_NOT_IN_ADDRESSES = ("?", "%")
_PATIENCE_SECONDS = 15
_USE = "use http://SERVER, sqlite:///FILE or a database such as postgresql+psycopg2://SERVER/NAME"


def tracking_uri() -> str:
    """Return $MLFLOW_TRACKING_URI, else the SQLite store in the home.

    Raises InputError as `embedded_store` does.
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{embedded_store() / 'mlflow.db'}"


def embedded_store() -> Path:
    """Return the folder of the store that needs no server, the home's mlruns/.

    Raises InputError for a home that can't hold it, being no folder, or of a name that an address of SQLite
    can't have, and for one that a job was not told.
    """
    if (folder := home_folder()) is None:
        problem = f"must name a server: the home {home()} can't hold an SQLite store"
        raise InputError("MLFLOW_TRACKING_URI", problem)
    if found := [sign for sign in _NOT_IN_ADDRESSES if sign in str(folder)]:
        problem = f"has {' and '.join(found)} in its name, which the address of an SQLite store can't have"
        raise InputError(folder, f"{problem}; choose another QLORA_HOME, or set MLFLOW_TRACKING_URI")
    return folder / "mlruns"


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite store; None for another address, and for one that names no file."""
    found = _SQLITE_FILE.fullmatch(uri)
    return Path(found[1]) if found and not found[1].startswith("file:") else None


def artifacts_folder() -> Path:
    """Return where the artifacts of a store without a server go: beside an SQLite file, else in the home."""
    file = sqlite_file(tracking_uri())
    return (file.absolute().parent if file else embedded_store()) / "artifacts"


def registry_uri() -> str:
    """Return $MLFLOW_REGISTRY_URI, else the tracking store's own address."""
    return os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri()


def address() -> str:
    """Return where records go, in words without a password."""
    own, registry = tracking_uri(), registry_uri()
    both = f"{own} with the registry {registry}" if registry != own else own
    return without_password(both)


def away(reason: str) -> TrackingAwayError:
    """Return the error for a server that gives no answer, with the reason on the same line."""
    words = " ".join(without_password(reason).split())
    return TrackingAwayError(f"the tracking server {address()} can't be reached: {words}")


def check_addresses() -> None:
    """Raise InputError for an address that no store can have, or whose database lacks its Python package."""
    for uri in dict.fromkeys((tracking_uri(), registry_uri())):
        scheme = uri.partition(":")[0].lower() if ":" in uri or uri in _DATABRICKS else ""
        kind = scheme.partition("+")[0]
        where = without_password(uri)
        if kind in ("", "file"):
            raise InputError(where, f"is a folder, which can be no tracking store; {_USE}")
        if kind not in (*_SERVERS, _SQLITE, *_DATABRICKS, *_DATABASES):
            raise InputError(where, f"is of the unknown kind {scheme}; {_USE}")
        if kind in _DATABASES:
            _engine(uri)
        if file := sqlite_file(uri):
            _check_sqlite(file)


def check_reachable() -> None:
    """Wait up to 15 s for the servers of the stores.

    Raises TrackingAwayError if one gives no answer, and InputError as `check_addresses` does.
    """
    hide_credentials(os.environ)
    check_addresses()
    for uri in dict.fromkeys((tracking_uri(), registry_uri())):
        scheme = uri.partition(":")[0].partition("+")[0].lower()
        if scheme in _SERVERS:
            _reach_server(uri)
        elif scheme in _DATABASES:
            reach_database(uri)


@functools.cache
def _check_sqlite(file: Path) -> None:
    """Raise InputError for a file that is no SQLite database, or one that was cut. Looks once."""
    if not file.is_file():
        return
    place = f"{file.absolute().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(place, uri=True)) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchall()
    except sqlite3.OperationalError:
        return  # it is busy, or can't be opened: whoever writes to it says so
    except sqlite3.DatabaseError as error:
        mend = "put a whole one in its place, or move it away to begin a new one"
        raise InputError(file, f"is a damaged database ({error}); {mend}") from None


@functools.cache
def reach_database(uri: str) -> None:
    """Reach a database server once; nothing is done for another address. MLflow itself tries for 101 s."""
    if uri.partition(":")[0].partition("+")[0].lower() in _DATABASES:
        import sqlalchemy

        engine = _engine(uri)
        try:
            with engine.connect():
                pass
        except sqlalchemy.exc.OperationalError as error:
            raise away(str(error.orig)) from None
        finally:
            engine.dispose()


def _engine(uri: str) -> Any:
    """Return SQLAlchemy's engine for a database, which is not reached yet."""
    import sqlalchemy

    try:
        return sqlalchemy.create_engine(uri)
    except ModuleNotFoundError as error:
        raise InputError(without_password(uri), f"needs the Python package {error.name}") from None
    except sqlalchemy.exc.ArgumentError as error:
        raise InputError(without_password(uri), f"is no address of a database: {error}") from None


def _reach_server(uri: str) -> None:
    """Wait for any answer of an MLflow server."""
    import requests

    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        left = end - time.monotonic()
        try:
            requests.get(f"{uri.rstrip('/')}/health", timeout=max(1.0, left), allow_redirects=False)
            return
        except requests.exceptions.Timeout:
            raise away("it gives no answer") from None
        except requests.exceptions.SSLError as error:
            raise away(str(error)) from None
        except requests.exceptions.ConnectionError as error:
            if left < 1:
                raise away(_reason(error)) from None
            time.sleep(1)
        except requests.exceptions.RequestException as error:
            raise InputError(without_password(uri), f"is no address of a server: {error}") from None


def _reason(error: BaseException | None) -> str:
    """Return what the operating system says of a connection that failed."""
    found = "it gives no answer"
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            found = error.strerror
        error = error.__cause__ or error.__context__
    return found
