"""Owns the records of a sweep's trials on disk: one JSON file a trial; no kill loses a point.

Ray's own state is for Ray; the ledger is what reports, early stopping after a restore, and people read.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from qlora.config import InputError, TrialData, TrialSettings, first_problem, parse_stages, split_config
from qlora.files import read_json, write_json
from tuning.objective import METRIC, VALUE, score_of, standing
from tuning.space import REPORTED

Status = Literal["pending", "running", "finished", "stopped", "failed", "diverged"]
POINT = (  # what a point of a curve holds
    "step",
    "epoch",
    "schedule_percent",
    "public_perplexity",
    "training_loss",
    "learning_rate",
    "tokens_per_second",
    "peak_memory_gib",
)
OF_OBJECTIVE = (METRIC, VALUE)  # what it may hold besides
_GOING_ON = ("pending", "running")
_TRIAL_ID = re.compile(r"\w[\w-]*", re.ASCII)


@dataclass(frozen=True)
class TrialRecord:
    """One trial: its configuration, how it ended, and its curve.

    curve: one point an evaluation, by ascending step. best_perplexities: of each public example at the best
    point. Times are in seconds since 1970. cloned_from, order: of a trial that people asked for, the trial
    whose settings it began with, and what they asked (tuning.orders).
    """

    trial_id: str
    config: dict[str, Any]
    status: Status = "pending"
    curve: tuple[dict[str, float], ...] = ()
    error: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    best_perplexities: tuple[float, ...] = ()
    cloned_from: str | None = None
    order: str | None = None

    def with_point(self, point: dict[str, float], perplexities: Sequence[float] = ()) -> "TrialRecord":
        """Return the record with one more point; it replaces one at the same step, as after a restore."""
        kept = tuple(old for old in self.curve if old["step"] < point["step"])
        record = replace(self, curve=(*kept, point))
        if record.best is point:
            return replace(record, best_perplexities=tuple(perplexities))
        return record if record.best is self.best else replace(record, best_perplexities=())

    @property
    def best(self) -> dict[str, float] | None:
        """Return the point with the lowest score (tuning.objective); None before the first evaluation.

        Scores that are no finite numbers, which sweeps from before may have, don't count.
        """
        finite = [point for point in self.curve if math.isfinite(score_of(point))]
        return min(finite, key=standing, default=None)

    def point_at(self, step: int) -> dict[str, float] | None:
        """Return the point of the curve at a step; None if there is none."""
        return next((point for point in self.curve if point["step"] == step), None)

    @property
    def has_ended(self) -> bool:
        """Tell whether nothing is left to do."""
        return self.status not in _GOING_ON

    def as_of(self, step: int) -> "TrialRecord":
        """Return the record as it was after so many steps, to go on from there."""
        curve = tuple(point for point in self.curve if point["step"] <= step)
        before = replace(self, status="pending", curve=curve, ended_at=None, error=None)
        return before if before.best is self.best else replace(before, best_perplexities=())

    @property
    def peak_memory_gib(self) -> float:
        """Return the most that the trial saw its GPU hold; 0 on a CPU."""
        return max((point["peak_memory_gib"] for point in self.curve), default=0.0)

    @property
    def percent(self) -> float:
        """Return the percent of its own schedule that the trial has reported."""
        return self.curve[-1]["schedule_percent"] if self.curve else 0.0

    @property
    def is_cut(self) -> bool:
        """Tell whether a budget or people stopped the trial, not a comparison."""
        return self.status == "stopped" and self.error is not None

    @property
    def reason(self) -> str:
        """Say why the trial ended before its time; empty if it did not."""
        if self.status == "stopped":
            return f"{self.error or 'early stopping'}, at {self.percent:.3g} % of its schedule"
        return self.error or ""


_RECORD = TypeAdapter(TrialRecord)


class Ledger:
    """The records of one sweep, in the order in which trials were first seen."""

    def __init__(self, folder: Path):
        """Read the records of a folder, if there is one. Raises InputError for a damaged record."""
        self.folder = folder
        self.records: dict[str, TrialRecord] = {}
        self._paths: dict[str, Path] = {}
        for path in sorted(folder.glob("*.json")):
            record = _read_record(path)
            if record.trial_id in self.records:
                other = self._paths[record.trial_id].name
                raise InputError(path, f"is of the same trial as {other}; remove the one that is a copy")
            self.records[record.trial_id], self._paths[record.trial_id] = record, path
        numbers = [int(path.name.partition("-")[0]) for path in self._paths.values()]
        self._next_number = max(numbers, default=-1) + 1

    def put(self, record: TrialRecord) -> None:
        """Store a record, in memory and on disk."""
        if record.trial_id not in self._paths:
            self._paths[record.trial_id] = self.folder / f"{self._next_number:04d}-{record.trial_id}.json"
            self._next_number += 1
        self.records[record.trial_id] = record
        write_json(self._paths[record.trial_id], asdict(record), "trial record")


def _read_record(path: Path) -> TrialRecord:
    """Read a trial's record. Raises InputError if it is damaged."""
    mend = "remove it, and --resume runs this trial anew"
    content = read_json(path, mend)
    try:
        record = _RECORD.validate_python(content)
        of_training, of_data = split_config(record.config)
        TrialSettings.model_validate(of_training)
        TrialData.model_validate(of_data)
    except ValidationError as error:
        key, problem = first_problem(error)
        raise InputError(path, f"is damaged ({key}: {problem}); {mend}") from None
    if any(set(POINT) - set(point) for point in record.curve):
        raise InputError(path, f"is damaged (a point of its curve lacks a figure); {mend}")
    if not all(math.isfinite(point["step"] + point["epoch"]) for point in record.curve):
        raise InputError(path, f"is damaged (a point of its curve is at no step); {mend}")
    if missing := set(REPORTED) - set(record.config):
        raise InputError(path, f"is damaged (its config lacks {', '.join(sorted(missing))}); {mend}")
    if not _TRIAL_ID.fullmatch(record.trial_id):  # it names a folder of the storage
        raise InputError(path, f"is damaged (no trial is called {record.trial_id!r}); {mend}")
    if not path.name.partition("-")[0].isdigit():
        raise InputError(path, "is no trial's record; remove it")
    return record


def ranked(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Sort records by the best score that each reached; those without any come last."""
    last = (math.inf, math.inf)
    return sorted(records, key=lambda record: standing(record.best) if record.best else last)


def share_of_epochs_saved(records: Sequence[TrialRecord]) -> float:
    """Return the share of all trials' full-length epochs that early stopping did not run.

    A trial that failed, diverged, or was cut by a budget or by hand counts as it ran.
    """
    planned = sum(full_epochs(record) for record in records)
    run = sum(record.curve[-1]["epoch"] if record.curve else 0.0 for record in records)
    lost = sum(
        full_epochs(record) - (record.curve[-1]["epoch"] if record.curve else 0.0)
        for record in records
        if record.status in ("failed", "diverged") or record.is_cut
    )
    return (planned - run - lost) / planned if planned else 0.0


def full_epochs(record: TrialRecord) -> float:
    """Count the epochs of a trial's whole schedule."""
    return float(sum(parse_stages(record.config["epochs"])))
