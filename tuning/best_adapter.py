"""Owns the adapter that a sweep leaves: the best trial's, or an average that is better.

Refuses to know how trials are run (tuning.sweep) and how averages are found (tuning.soup).
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qlora.checkpoint_files import ADAPTER, CheckpointError
from qlora.failpoints import durable
from qlora.files import below
from tuning.checkpoints import RAY, Storage, best_checkpoint, checkpoint_paths
from tuning.ledger import Ledger, TrialRecord, ranked
from tuning.soup import Soup, soup_adapter


class NoTrialSucceededError(RuntimeError):
    """A sweep without an adapter: every trial failed or diverged."""


@dataclass(frozen=True)
class BestAdapter:
    """The adapter that a sweep found, and what it is made of.

    record: the best trial. members: the trials that it is made of, the best one alone or those of an average.
    folder: a PEFT folder with the adapter. checkpoints: where every trial's best checkpoint is. soup: what
    average it is, if it is one.
    """

    record: TrialRecord
    members: Sequence[TrialRecord]
    folder: Path
    checkpoints: dict[str, str]
    soup: Soup | None = None

    @property
    def public_perplexity(self) -> float:
        """Return the adapter's public perplexity."""
        if self.soup is not None and self.soup.public_perplexity is not None:
            return self.soup.public_perplexity
        assert self.record.best is not None
        return self.record.best["public_perplexity"]

    @property
    def weights(self) -> dict[str, float]:
        """Return the share of each trial in the adapter, by trial."""
        return self.soup.weights if self.soup is not None else {self.record.trial_id: 1.0}


def keep_best_adapter(folder: Path, place: str, soup: Soup | None) -> BestAdapter:
    """Copy the best adapter of a sweep to `folder`/best: a soup that beats all trials, else the best trial's.

    Trials' checkpoints are below `place`. Raises NoTrialSucceededError if no trial has reported a perplexity,
    CheckpointError if what the best one left is damaged: its record is then set back to the checkpoint
    before, from where the sweep can go on.
    """
    ledger, storage = Ledger(folder / "trials"), Storage.at(below(place, RAY))
    records = list(ledger.records.values())
    best = next((record for record in ranked(records) if record.best), None)
    if best is None:
        raise NoTrialSucceededError(_why_none(records))
    found = BestAdapter(best, [best], folder / "best", checkpoint_paths(storage, ledger.records))
    if soup is not None and soup.beats(found.public_perplexity):
        found = replace(found, members=[ledger.records[name] for name in soup.weights], soup=soup)
        _copy_adapter(soup_adapter(folder), found.folder)
        return found
    try:
        with best_checkpoint(storage, best) as source:
            _copy_adapter(source / ADAPTER, found.folder)
    except CheckpointError:
        _set_back(ledger, storage, best)
        raise
    return found


def _copy_adapter(source: Path, target: Path) -> None:
    unfinished = target.with_name(f".{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    with durable("best adapter copied"):
        shutil.copytree(source, unfinished)
    if target.exists():
        with durable("old best adapter removed"):
            shutil.rmtree(target)
    with durable("best adapter"):
        unfinished.rename(target)


def _set_back(ledger: Ledger, storage: Storage, record: TrialRecord) -> None:
    """Let a trial go on from the checkpoint before its best one, which is damaged."""
    assert record.best is not None
    stored = storage.checkpoints(storage.folder_of(record.trial_id))
    before = [one.step for one in stored if one.step < record.best["step"]]
    for one in stored:
        if one.step >= record.best["step"]:
            storage.remove(one.path)
    ledger.put(record.as_of(max(before, default=0)))


def _why_none(records: Sequence[TrialRecord]) -> str:
    diverged = [record for record in records if record.status == "diverged"]
    if len(diverged) == len(records):
        return f"all {len(records)} trials diverged: {diverged[0].error}; lower the learning rate's bounds"
    reasons = "; ".join(dict.fromkeys(record.reason for record in records if record.reason))
    return f"no trial reached an evaluation: {reasons or 'see trials/ in its folder'}"
