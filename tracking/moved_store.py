"""Owns a store without a server whose folder was moved or copied: its artifacts are found where they are now.

MLflow writes whole paths of artifacts into its database. Where these lead elsewhere, while the artifacts lie
beside the database, the home was moved or copied, and the paths are put right: else a moved home would have
no models, and a copied one would write into the one that it was copied from.

Refuses to load MLflow.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qlora.failpoints import durable

# The columns of MLflow 3 that hold whole paths, by table.
_PATHS = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}
_OF_A_HOME = ("mlruns", "artifacts")
_PATIENCE_SECONDS = 30


def follow_artifacts(file: Path, artifacts: Path) -> None:
    """Have an SQLite store's paths lead to where its artifacts are: a folder beside its file.

    Paths into a folder of the same name elsewhere are changed if what they lead to is here. A store that
    can't be read or written is left to whoever opens it next.
    """
    if not file.is_file():
        return
    here = artifacts.as_uri()
    try:
        with closing(sqlite3.connect(file, timeout=_PATIENCE_SECONDS)) as database:
            for before in _elsewhere(database, artifacts):
                with durable("artifacts followed"), database:
                    for table, column in _PATHS.items():
                        is_below = f"{column} = ? OR substr({column}, 1, ?) = ?"
                        change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {is_below}"
                        length = len(before)
                        database.execute(change, (here, length + 1, before, length + 1, f"{before}/"))
    except sqlite3.Error:
        return


def _elsewhere(database: sqlite3.Connection, artifacts: Path) -> list[str]:
    """Return the folders of artifacts elsewhere that the store names, and whose artifacts are here."""
    query = "SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE ?"
    named = [one for (one,) in database.execute(query, (f"file:%/{artifacts.name}",))]
    return [one for one in named if one != artifacts.as_uri() and _are_here(database, one, artifacts)]


def _are_here(database: sqlite3.Connection, before: str, artifacts: Path) -> bool:
    """Tell whether what a store names below a folder elsewhere is here.

    Where that folder is gone, one thing of it tells, or that it was a home's; where it is there, all of it.
    """
    there, names = _path_of(before), _names_below(database, before)
    are_here = [(artifacts / name).exists() for name in names]
    if not there.exists():
        return not names or any(are_here) or there.parts[-2:] == artifacts.parts[-2:] == _OF_A_HOME
    if there.samefile(artifacts):
        return False  # reached by another path
    lacking = [name for name, is_here in zip(names, are_here, strict=True) if not is_here]
    return any(are_here) and not any((there / name).exists() for name in lacking)


def _names_below(database: sqlite3.Connection, before: str) -> list[str]:
    """Return the paths, below a folder, of the artifacts of the runs and models that a store has there."""
    names = []
    for table in ("runs", "logged_models"):
        column = _PATHS[table]
        query = f"SELECT {column} FROM {table} WHERE substr({column}, 1, ?) = ?"
        for (uri,) in database.execute(query, (len(before) + 1, f"{before}/")):
            names.append(unquote(uri[len(before) + 1 :]))
    return names


def _path_of(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path))
