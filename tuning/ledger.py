"""Owns the records of a sweep's trials on disk: one JSON file a trial; no kill loses a point.

Ray's own state is for Ray; the ledger is what reports, early stopping after a restore, and people read.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qlora.config import parse_stages
from qlora.files import write_json

Status = Literal["pending", "running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial: its configuration, how it ended, and its curve.

    curve: one point an evaluation, by ascending step. best_perplexities: of each public example at the best
    point. Times are in seconds since 1970.
    """

    trial_id: str
    config: dict[str, Any]
    status: Status = "pending"
    curve: tuple[dict[str, float], ...] = ()
    error: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    best_perplexities: tuple[float, ...] = ()

    def with_point(self, point: dict[str, float], perplexities: Sequence[float] = ()) -> "TrialRecord":
        """Return the record with one more point; it replaces one at the same step, as after a restore."""
        kept = tuple(old for old in self.curve if old["step"] < point["step"])
        record = replace(self, curve=(*kept, point))
        if record.best is point:
            return replace(record, best_perplexities=tuple(perplexities))
        return record if record.best is self.best else replace(record, best_perplexities=())

    @property
    def best(self) -> dict[str, float] | None:
        """Return the point with the lowest public perplexity; None before the first evaluation."""
        return min(self.curve, key=lambda point: point["public_perplexity"], default=None)

    @property
    def peak_memory_gib(self) -> float:
        """Return the most that the trial saw its GPU hold; 0 on a CPU."""
        return max((point["peak_memory_gib"] for point in self.curve), default=0.0)

    @property
    def percent(self) -> float:
        """Return the percent of its own schedule that the trial has reported."""
        return self.curve[-1]["schedule_percent"] if self.curve else 0.0

    @property
    def reason(self) -> str:
        """Say why the trial ended before its time; empty if it did not."""
        if self.status == "stopped":
            return f"ASHA, at {self.percent:.3g} % of its schedule"
        return self.error or ""


class Ledger:
    """The records of one sweep, in the order in which trials were first seen."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.records: dict[str, TrialRecord] = {}
        for path in sorted(folder.glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            self.records[content["trial_id"]] = TrialRecord(
                **{
                    **content,
                    "curve": tuple(content["curve"]),
                    "best_perplexities": tuple(content.get("best_perplexities", ())),
                }
            )

    def put(self, record: TrialRecord) -> None:
        """Store a record, in memory and on disk."""
        order = (
            list(self.records).index(record.trial_id)
            if record.trial_id in self.records
            else len(self.records)
        )
        self.records[record.trial_id] = record
        write_json(self.folder / f"{order:04d}-{record.trial_id}.json", asdict(record))


def ranked(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Sort records by the best perplexity that each reached; those without any come last."""
    return sorted(
        records, key=lambda record: record.best["public_perplexity"] if record.best else float("inf")
    )


def share_of_epochs_saved(records: Sequence[TrialRecord]) -> float:
    """Return the share of all trials' full-length epochs that early stopping did not run.

    A failed trial counts as it ran.
    """
    planned = sum(_full_epochs(record) for record in records)
    run = sum(record.curve[-1]["epoch"] if record.curve else 0.0 for record in records)
    lost = sum(
        _full_epochs(record) - (record.curve[-1]["epoch"] if record.curve else 0.0)
        for record in records
        if record.status == "failed"
    )
    return (planned - run - lost) / planned if planned else 0.0


def _full_epochs(record: TrialRecord) -> float:
    return float(sum(parse_stages(record.config["epochs"])))
