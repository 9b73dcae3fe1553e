"""Owns what the home keeps of sweeps and studies, seen from outside: which there are, bring one, remove one.

Refuses to know how they are made, and leaves their runs and versions alone.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow.fs import FileInfo, FileSelector, FileType

from qlora.config import InputError
from qlora.files import below
from qlora.home import RESULTS, home_place
from tuning.checkpoints import Storage
from workflows.mirror import Mirror, asking
from workflows.results import STUDIES, open_results

_SWEEP, _STUDY, _SUMMARY, _PAGE = "sweep.json", "study.json", "summary.json", "study.html"


@dataclass(frozen=True)
class Kept:
    """A sweep or a study of the home.

    state: "finished" or "unfinished". best: the lowest public perplexity of a finished sweep. num_bytes: of
    all its files there, checkpoints included. changed: seconds since 1970.
    """

    name: str
    state: str
    best: float | None
    num_bytes: int
    changed: float


def kept_results() -> list[Kept]:
    """List the sweeps and studies of the home, the one that changed last first.

    Raises InputError for a home that can't be read.
    """
    place = home_place(RESULTS)
    with asking(place, "can't be read"):
        results = Storage.at(place)
        found = [*_folders(results, results.path), *_folders(results, f"{results.path}/{STUDIES}")]
        kept = [_kept(results, info) for info in found]
    return sorted((one for one in kept if one), key=lambda one: -one.changed)


def fetch(name: str, target: Path) -> Path:
    """Bring a sweep or a study, less its checkpoints, to a folder of its name below `target`; returns that.

    Raises InputError if there is none of this name, and if the folder is there already.
    """
    folder = target / name.rpartition("/")[2]
    if folder.exists():
        raise InputError(folder, "is there already; name another folder with --to")
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        Mirror(home_place(RESULTS, *name.split("/")), unfinished).fetch()
        if not any(unfinished.iterdir()):
            raise _no_such(name)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def remove(name: str) -> str:
    """Remove a sweep or a study with all its checkpoints; return what may be left of it elsewhere, or "".

    Raises InputError if there is none of this name, and if a process works on it.
    """
    left = ""
    with open_results(*name.split("/"), only=(_SWEEP, _STUDY)) as results:
        places = [results.place]
        if (results.path / _SWEEP).is_file():
            found = _read(results.path / _SWEEP)
            if not found:
                left = (
                    f"{_SWEEP} is damaged: checkpoints that the sweep kept in a storage of its own are there"
                )
            storage = (found.get("space") or {}).get("storage")
            places = [below(storage, results.path.name), *places] if storage else places
        elif not (results.path / _STUDY).is_file():
            raise _no_such(name)
        with results.held(places[0] if len(places) > 1 else None):
            for place in places:
                with asking(place, "can't be removed"):
                    _delete(Storage.at(place))
    return left


def _delete(place: Storage) -> None:
    """Delete a folder, and last what it is found by."""
    infos = place.filesystem.get_file_info(FileSelector(place.path))
    for info in infos:
        if info.type == FileType.Directory:
            place.filesystem.delete_dir(info.path)
        elif info.base_name not in (_SWEEP, _STUDY):
            place.filesystem.delete_file(info.path)
    place.filesystem.delete_dir(place.path)


def _no_such(name: str) -> InputError:
    return InputError(name, f"is no sweep or study under {home_place(RESULTS)}; --list shows which there are")


def _folders(results: Storage, path: str) -> Iterator[FileInfo]:
    selector = FileSelector(path, allow_not_found=True)
    for info in results.filesystem.get_file_info(selector):
        if info.type == FileType.Directory and info.base_name != STUDIES:
            yield info


def _kept(results: Storage, folder: FileInfo) -> Kept | None:
    """Return what is known of a folder; None if it holds neither a sweep nor a study."""
    files = [
        info
        for info in results.filesystem.get_file_info(FileSelector(folder.path, recursive=True))
        if info.type == FileType.File
    ]
    names = {str(info.path).removeprefix(folder.path).strip("/") for info in files}
    if not names & {_SWEEP, _STUDY}:
        return None
    name = str(folder.path).removeprefix(results.path).strip("/")
    best = None
    if _SUMMARY in names:
        with results.filesystem.open_input_stream(f"{folder.path}/{_SUMMARY}") as file:
            best = _best(file.read())
    return Kept(
        name,
        "finished" if names & {_SUMMARY, _PAGE} else "unfinished",
        best,
        sum(info.size or 0 for info in files),
        max((info.mtime_ns or 0) / 1e9 for info in files),
    )


def _best(summary: bytes) -> float | None:
    """Return the best perplexity that a summary tells; None if it is damaged."""
    try:
        return float(json.loads(summary)["best"]["public_perplexity"])
    except (ValueError, KeyError, TypeError):
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return content if isinstance(content, dict) else {}
