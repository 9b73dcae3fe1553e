"""Owns a sweep's folder under results/ of the home: its settings, how it is found again, how it ended.

Loads nothing heavy.

    results/NAME/sweep.json    id, settings, digests of data and prompt, written before anything runs
    results/NAME/prompt.yaml   the prompt's template as it was then
    results/NAME/public.jsonl  the examples that public perplexity is measured on
    results/NAME/start/        the adapter that trials go on from, if there is one
    results/NAME/trials/       one record a trial
    results/NAME/orders/       what people asked of it while it ran
    results/NAME/ray/          Ray Tune's own state and checkpoints
    results/NAME/soup/         what averaging the best trials' adapters came to, and the best average
    results/NAME/best/         the best adapter, PEFT
    results/NAME/summary.json  the end result, written last
    results/NAME/.lock         held by the process that works on the sweep
"""

import hashlib
import math
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from qlora.addresses import holds_credentials
from qlora.base.reference import split_revision
from qlora.config import InputError, first_problem, validated
from qlora.failpoints import durable
from qlora.files import below, read_json, write_json, write_text
from qlora.home import RESULTS, home_folder, home_place, in_results
from tuning.checkpoints import RAY
from tuning.ledger import Ledger
from tuning.space import STORED, Space, checked_name, load_space
from workflows.data_sets import DataSets

# Of what sweep.json has digests; sweeps from before lack some.
_ROLES = {"train", "public", "holdout", "prompt", "base_files", "base_weights", "objective"}
_ZERO_SHOT, _START = "zero_shot.json", "start"
_OF_TRIALS = ("trials", _ZERO_SHOT, RAY, "soup", "best")  # what a sweep writes once it has begun


class _Best(TypedDict):
    trial_id: str | None
    public_perplexity: float
    checkpoint: str
    model_uri: str


class _Champion(TypedDict):
    is_champion: bool
    reason: str


class _Summary(TypedDict):
    """Name what is read of a summary again."""

    zero_shot: float
    best: _Best
    champion: _Champion


_SUMMARY = TypeAdapter(_Summary)


@dataclass(frozen=True)
class SweepFolder:
    """One sweep on disk.

    space_file: where its space was read from. sweep_id: of this very sweep; None for one from before sweeps
    had ids. digests: of what it started with, by role; empty before it starts. start: (name, PEFT folder) of
    the adapter that its trials go on from, if there is one.
    """

    folder: Path
    space_file: str
    space: Space
    sweep_id: str | None
    digests: Mapping[str, str]
    start: tuple[str, Path] | None = None

    @property
    def name(self) -> str:
        """Return the sweep's name, which is its folder's."""
        return self.folder.name

    @property
    def storage(self) -> str:
        """Return below which path or URI checkpoints are kept: `storage` of the space, else the home."""
        return below(self.space.storage, self.name) if self.space.storage else self.place

    @property
    def place(self) -> str:
        """Return where the sweep is kept: a path, or a URI of which the folder is a copy."""
        return home_place(RESULTS, self.name) if home_folder() is None else str(self.folder.resolve())

    @property
    def model_name(self) -> str:
        """Return the name of the registered model and the experiment.

        It is as the space says, else the name of the space file.
        """
        return self.space.registered_model or Path(self.space_file).stem

    @property
    def prompt_file(self) -> Path:
        """Return where the prompt's template is kept as it was at the start."""
        return self.folder / "prompt.yaml"

    def check_free(self) -> None:
        """Raise InputError if the folder of a sweep that has not started holds one, or what one left."""
        if self.digests:
            return
        if self.summary() is not None:
            remove = f"python ray_jobs/fetch.py --remove {self.name}"
            problem = f"holds a finished sweep; choose another --name, or remove it first: {remove}"
            raise InputError(self.folder, problem)
        if (self.folder / "sweep.json").exists():
            raise InputError(
                self.folder,
                f"holds an unfinished sweep; continue it with --resume {self.name}, or choose another --name",
            )
        if left := [name for name in _OF_TRIALS if (self.folder / name).exists()]:
            problem = f"holds {', '.join(left)} of a sweep whose sweep.json is gone"
            raise InputError(self.folder, f"{problem}; choose another --name, or remove the folder")

    def claim(self, digests: Mapping[str, str], prompt_text: str | None, sets: DataSets) -> None:
        """Write sweep.json: from here on the sweep exists and can be resumed.

        One that exists stays as it is. `prompt_text`: of the prompt that all trials have, if they have one.
        """
        if self.digests:
            return
        if self.start:
            with durable("start adapter"):
                shutil.copytree(self.start[1], self.folder / _START, dirs_exist_ok=True)
        if prompt_text is not None:
            self.keep_prompt(prompt_text)
        sets.keep_public(self.folder)
        content = {
            "sweep": self.name,
            "sweep_id": self.sweep_id,
            "space_file": self.space_file,
            "space": self.space.model_dump(mode="json"),
            "digests": dict(digests),
            "continue_from": self.start[0] if self.start else None,
            "start_digest": _folder_digest(self.folder / _START) if self.start else None,
        }
        write_json(self.folder / "sweep.json", content)

    def keep_prompt(self, text: str) -> None:
        """Write the prompt's template as it is, unless it stands there: versions carry it."""
        if not self.prompt_file.is_file() or self.prompt_file.read_bytes() != text.encode():
            write_text(self.prompt_file, text)

    def summary(self) -> dict[str, Any] | None:
        """Return the content of summary.json; None while the sweep is not finished.

        Raises InputError if it is damaged.
        """
        path = self.folder / "summary.json"
        mend = f"remove it, and --resume {self.name} writes it again"
        try:
            content = read_json(path, mend)
        except FileNotFoundError:
            return None
        try:
            _SUMMARY.validate_python(content, strict=True)
        except ValidationError as error:
            key, problem = first_problem(error)
            raise InputError(path, f"is damaged ({key}: {problem}); {mend}") from None
        return content

    def zero_shot(self) -> dict[str, float] | None:
        """Return the base's public perplexity by prompt; None if it is not known, or can't be read."""
        try:
            content = read_json(self.folder / _ZERO_SHOT, "")
        except (FileNotFoundError, InputError):
            return None  # it is measured again
        found = content.get("by_prompt", {"": content.get("public_perplexity")})
        are_good = isinstance(found, dict) and all(
            isinstance(value, float) and math.isfinite(value) for value in found.values()
        )
        return found if found and are_good else None

    def zero_shot_values(self) -> dict[str, float]:
        """Return the objective's value for the base's texts, by prompt; empty if it is not known."""
        try:
            found = read_json(self.folder / _ZERO_SHOT, "").get("objective")
        except (FileNotFoundError, InputError):
            return {}
        are_good = isinstance(found, dict) and all(isinstance(value, float) for value in found.values())
        return found if found and are_good else {}

    def keep_zero_shot(self, by_prompt: Mapping[str, float], values: Mapping[str, float]) -> None:
        """Write the base's public perplexity under each prompt, and the objective's values, if any."""
        content = {"public_perplexity": min(by_prompt.values()), "by_prompt": dict(by_prompt)}
        write_json(self.folder / _ZERO_SHOT, content | ({"objective": dict(values)} if values else {}))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json: from here on the sweep is finished."""
        write_json(self.folder / "summary.json", summary)

    @property
    def how_to_go_on(self) -> str:
        """Return what to run if the sweep is stopped."""
        return f"the sweep can go on: python ray_jobs/tune.py --resume {self.name}"


def plan_sweep(
    folder: Path, space_file: str, overrides: list[str], continue_from: str | None = None
) -> SweepFolder:
    """Return a sweep that has not started.

    Raises InputError for a bad space, a name that is taken, an adapter that doesn't fit.
    """
    start = None
    if continue_from:
        from workflows.sweep.starting_point import starting_point

        start = starting_point(continue_from)
    space = load_space(space_file, overrides, start.settings if start else None)
    if space.storage and holds_credentials(space.storage):  # it is written to files, runs and pages
        raise InputError(
            f"{space_file}:storage",
            "holds a name, a password or a key; give them in the environment of all nodes",
        )
    if start and split_revision(start.base)[0] == space.base_model.name:  # which names no commit
        base = space.base_model.model_copy(update={"name": start.base})
        space = space.model_copy(update={"base_model": base})
    if start and start.base != space.base_model.name:
        raise InputError(
            "--continue-from",
            f"{continue_from} belongs to the base {start.base}, not to {space.base_model.name}; "
            f"add --set base_model.name={start.base}",
        )
    sweep = SweepFolder(
        folder,
        space_file,
        space,
        sweep_id=uuid.uuid4().hex,
        digests={},
        start=(start.name, start.folder) if start else None,
    )
    try:
        checked_name(sweep.model_name)
    except ValueError as error:
        raise InputError(f"{space_file}:registered_model", f"{error}; set registered_model") from None
    sweep.check_free()
    return sweep


def reopen_sweep(folder: Path) -> SweepFolder:
    """Return a sweep that was started before.

    Raises InputError if there is none, and for a damaged file of its folder.
    """
    path, mend = folder / "sweep.json", "start a new sweep under another --name"
    try:
        content = read_json(path, mend)
    except FileNotFoundError:
        problem = f"there is no sweep {folder.name!r} under {in_results()}/; start it with --space"
        raise InputError("--resume", problem) from None
    started_from, digests = content.get("continue_from"), content.get("digests")
    sweep_id = content.get("sweep_id")
    texts = (content.get("space_file"), started_from or "", sweep_id or "")
    if (
        not all(isinstance(text, str) for text in texts)
        or not isinstance(digests, dict)
        or not digests
        or not set(digests) <= _ROLES
    ):
        raise InputError(path, f"is damaged (it lacks what a sweep has); {mend}")
    _check_no_copy(folder, content)
    if started_from:
        _check_start(folder / _START, started_from, content.get("start_digest"))
    Ledger(folder / "trials")  # a damaged record is told now, not once Ray has started
    return SweepFolder(
        folder,
        content["space_file"],
        validated(path, lambda: Space.model_validate(content.get("space"), context=STORED)),
        sweep_id=sweep_id,
        digests=digests,
        start=(started_from, folder / _START) if started_from else None,
    )


def _check_no_copy(folder: Path, content: Mapping[str, Any]) -> None:
    """Raise InputError for a copy of the folder of a sweep beside it: both would be the same in MLflow."""
    name, sweep_id = content.get("sweep"), content.get("sweep_id")
    if not isinstance(name, str) or name == folder.name or sweep_id is None:
        return
    original = folder.parent / name
    try:
        is_copy = read_json(original / "sweep.json", "").get("sweep_id") == sweep_id
    except (OSError, InputError):  # it was renamed
        return
    if is_copy and not original.samefile(folder):
        problem = f"is a copy of the sweep {name!r}; go on with that (--resume {name}), or start a new sweep"
        raise InputError(folder, problem)


def _check_start(folder: Path, name: str, digest: str | None) -> None:
    """Raise InputError unless the adapter that trials go on from is what it was.

    `digest`: none for a sweep from before it was kept.
    """
    if not folder.is_dir() or _folder_digest(folder) != (digest or _folder_digest(folder)):
        raise InputError(folder, f"is not what it was; put the adapter {name} there again, all of its files")


def _folder_digest(folder: Path) -> str:
    """Return the SHA-256 (hexadecimal) of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder)).encode()
        digest.update(hashlib.sha256(name).digest() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
