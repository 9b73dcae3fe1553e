"""Owns a sweep's soup: the average of its finalists' adapters that is better than each of them, if one is.

Trials that end near each other leave adapters that err differently; the mean of their updates often predicts
better than the best of them and costs no training. So do the checkpoints of one trial: each trial has two.
Members are chosen greedily on the public examples: from the best checkpoint down, each is added that lowers
the perplexity of the average. An average whose rank no GPU takes is brought to one that fits, once members
are chosen, and what is registered is what is measured then.

Refuses to know how averages are made (qlora.lora.average) and how hosts are found.

Source: greedy model soups, https://arxiv.org/abs/2203.05482.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from qlora.checkpoint_files import ADAPTER, CheckpointError, verify_checkpoint
from qlora.config import MAX_RANK, InputError
from qlora.data.prompts import EncodedExample
from qlora.failpoints import durable
from qlora.files import read_json, write_json
from qlora.lora.average import Update, mean_update, rank_of, read_update, reduced
from qlora.lora.peft_folder import AdapterFiles
from qlora.lora.products import MAX_GPU_RANK
from qlora.perplexity import mean_perplexity
from tuning.checkpoints import Storage
from tuning.examples import SweepExamples
from tuning.ledger import TrialRecord, ranked
from tuning.shared_work import SharedWork

FINALISTS = 12  # checkpoints that may be members, at most
_FARTHEST = 1.15  # from the best perplexity: what is farther off was never seen to help
AVERAGES_SHARE = 0.04  # of a sweep's work that averages may cost; reading and averaging adapters comes to it
_BACKWARD = 2  # a training pass is a forward, as an evaluation is, and a backward of twice that
_MOST_LOST = 0.002  # of perplexity, by bringing an average to a lower rank
_FOLDER, _FACTS = "soup", "soup.json"


@dataclass(frozen=True)
class Finalist:
    """A checkpoint of a trial that may be a member: its step, its public perplexity, and where it is kept.

    prompt: the name of the one that its trial was trained under.
    """

    trial_id: str
    step: int
    public_perplexity: float
    checkpoint: str
    prompt: str

    @property
    def name(self) -> str:
        """Return what tells it from others of a sweep."""
        return f"{self.trial_id} at {self.step}"


@dataclass(frozen=True)
class Member:
    """A checkpoint of a trial that an average is made of, and its weight."""

    trial_id: str
    step: int
    weight: float


@dataclass(frozen=True)
class Soup:
    """Tells what averaging came to.

    finalists: the perplexity of each checkpoint that could be a member. measured: how many averages were.
    members: with weights that sum to 1; none if no average beats the best trial. perplexities: of each public
    example. rank: of the adapter. lost: the share of perplexity that bringing it to this rank cost. digest:
    of the adapter's files.
    """

    finalists: dict[str, float]
    measured: int
    seconds: float
    members: tuple[Member, ...]
    public_perplexity: float | None = None
    perplexities: tuple[float, ...] = ()
    rank: int = 0
    lost: float = 0.0
    digest: str = ""

    @property
    def weights(self) -> dict[str, float]:
        """Return the share of each trial, all of its checkpoints together."""
        shares: dict[str, float] = {}
        for member in self.members:
            shares[member.trial_id] = shares.get(member.trial_id, 0.0) + member.weight
        return shares

    def beats(self, public_perplexity: float) -> bool:
        """Tell whether there is an average that is better than this."""
        return self.public_perplexity is not None and self.public_perplexity < public_perplexity


_SOUP = TypeAdapter(Soup)


def finalists(records: Sequence[TrialRecord], examples: SweepExamples, storage: Storage) -> list[Finalist]:
    """Return the checkpoints that may be members, the best first: those near the best one.

    Their trials have finished or were stopped, and have the best one's prompt, which an adapter is served
    with.
    """
    there = [one for one in ranked(records) if one.best and one.status in ("finished", "stopped")]
    prompts = [examples.prompt_of(one.config) for one in there]
    there = [one for one, prompt in zip(there, prompts, strict=True) if prompt == prompts[0]]
    found = []
    for record in there[:FINALISTS]:
        known = {int(point["step"]): point["public_perplexity"] for point in record.curve}
        for stored in storage.checkpoints(storage.folder_of(record.trial_id)):
            if stored.index >= 0 and stored.step in known:
                value = known[stored.step]
                found.append(Finalist(record.trial_id, stored.step, value, stored.path, prompts[0]))
    found.sort(key=lambda one: one.public_perplexity)
    near = [one for one in found if one.public_perplexity <= _FARTHEST * found[0].public_perplexity]
    return near[:FINALISTS]


def perplexities_of(found: Sequence[Finalist]) -> dict[str, float]:
    """Return the finalists' perplexities: what tells whether averages are still those of a sweep."""
    return {one.name: one.public_perplexity for one in found}


def affordable_averages(records: Sequence[TrialRecord], examples: SweepExamples) -> int:
    """Count the averages whose measuring is a small share of the sweep's work.

    It follows from what trials did, not from the time it took, so that a sweep that was interrupted comes to
    the same.
    """
    work, dearest = 0.0, 1
    for record in records:
        if record.curve:
            found = examples.of(record.config)
            work += (1 + _BACKWARD) * record.curve[-1]["epoch"] * found.train_tokens
            work += len(record.curve) * found.public_tokens
            dearest = max(dearest, found.public_tokens)
    return int(AVERAGES_SHARE * work / dearest)


def find_soup(
    work: SharedWork, public: Sequence[EncodedExample], storage: Storage, found: Sequence[Finalist], most: int
) -> tuple[Soup, AdapterFiles | None]:
    """Measure at most so many averages of finalists on a device; return the best one, and its adapter.

    A finalist whose checkpoint is damaged is left out, and so is one that makes an average too large for the
    device's memory. Raises CheckpointError if the best one's is damaged, and what measuring raises.
    """
    started, bench = time.monotonic(), _Bench(work, public, storage, most)
    chosen, best = bench.choose(found)
    competed = perplexities_of(found)
    if best is None:
        return Soup(competed, bench.measured, time.monotonic() - started, ()), None
    adapter = bench.adapter_files(chosen)
    soup = Soup(
        finalists=competed,
        measured=bench.measured,
        seconds=time.monotonic() - started,
        members=tuple(Member(one.trial_id, one.step, 1 / len(chosen)) for one in found if one.name in chosen),
        public_perplexity=best.public_perplexity,
        perplexities=tuple(best.perplexities),
        rank=best.rank,
        lost=best.lost,
        digest=adapter.digest,
    )
    return soup, adapter


def keep_soup(folder: Path, soup: Soup, adapter: AdapterFiles | None) -> None:
    """Keep in a sweep's folder what averaging came to, and the adapter if an average is best."""
    target, unfinished = folder / _FOLDER, folder / f".{_FOLDER}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if adapter is not None:
        adapter.write(unfinished / ADAPTER)
    write_json(unfinished / _FACTS, asdict(soup))
    with durable("soup kept"):
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)


def kept_soup(folder: Path, found: Sequence[Finalist]) -> Soup | None:
    """Return what averaging these finalists came to; None if it was not done, or its files are damaged."""
    try:
        soup = _SOUP.validate_python(read_json(folder / _FOLDER / _FACTS, ""))
        if soup.finalists != perplexities_of(found):
            return None
        if soup.members and AdapterFiles.read(soup_adapter(folder)).digest != soup.digest:
            return None
    except (OSError, InputError, ValidationError):
        return None  # it is measured again
    return soup


def soup_adapter(folder: Path) -> Path:
    """Return the PEFT folder of a sweep's best average."""
    return folder / _FOLDER / ADAPTER


def _is_best(finalist: Finalist, found: Sequence[Finalist]) -> bool:
    """Tell whether no other checkpoint of a finalist's trial is better."""
    return finalist is next(one for one in found if one.trial_id == finalist.trial_id)


@dataclass(frozen=True)
class _Average:
    """A measured average: the perplexity of each public example, its rank, what bringing it to that cost."""

    perplexities: list[float]
    rank: int
    lost: float = 0.0

    @property
    def public_perplexity(self) -> float:
        return mean_perplexity(self.perplexities)


class _Bench:
    """Averages of finalists, measured on a device; there is time for `most` of them.

    Members are in the host's memory: those that are chosen, and the one that is tried.
    """

    def __init__(self, work: SharedWork, public: Sequence[EncodedExample], storage: Storage, most: int):
        self._work, self._public, self._storage, self._left = work, public, storage, most
        self._members = dict[str, Update]()
        self.measured = 0

    def choose(self, finalists: Sequence[Finalist]) -> tuple[tuple[str, ...], _Average | None]:
        """Add to the first finalist each that makes the average better; return their names.

        If the rank is too high then, and too much is lost by bringing it down, the last average counts whose
        rank fits. Raises CheckpointError if the first one's checkpoint is damaged.
        """
        first, *others = finalists
        self._members[first.name] = self._read(first)
        chosen: tuple[str, ...] = (first.name,)
        best: _Average | None = None
        fitting, lowest = (chosen, best), first.public_perplexity
        for one in others:
            together = (*chosen, one.name)
            if self._left < 1 or not self._is_there(one, finalists):
                continue
            found = self._measured(together)
            if found is None or found.public_perplexity >= lowest:
                del self._members[one.name]
                continue
            chosen, best, lowest = together, found, found.public_perplexity
            if self._rank(chosen) <= self._most_rank:
                fitting = (chosen, best)
        if best is None or self._rank(chosen) <= self._most_rank:
            return chosen, best
        found = self._measure(chosen, partial(self._reduced, chosen))
        if found is None:
            return fitting
        found = replace(found, lost=found.public_perplexity / best.public_perplexity - 1)
        return (chosen, found) if found.lost < _MOST_LOST else fitting

    def adapter_files(self, names: Sequence[str]) -> AdapterFiles:
        """Return the PEFT folder of an average."""
        adapter = self._work.attach(self._reduced(names))
        with tempfile.TemporaryDirectory() as folder:
            self._work.bank.save(adapter, Path(folder))
            self._work.bank.detach(adapter)
            return AdapterFiles.read(folder)

    @property
    def _most_rank(self) -> int:
        """Return the rank that an average may have: what a GPU takes, or what one of its members has."""
        return max(MAX_GPU_RANK, *map(rank_of, self._members.values()))

    def _is_there(self, one: Finalist, finalists: Sequence[Finalist]) -> bool:
        """Read a finalist; tell whether its checkpoint is whole."""
        try:
            self._members[one.name] = self._read(one)
        except CheckpointError:
            which = "best checkpoint" if _is_best(one, finalists) else f"checkpoint of step {one.step}"
            self._work.note(f"trial {one.trial_id}: its {which} is damaged; it is in no average")
            return False
        return True

    def _read(self, one: Finalist) -> Update:
        with self._storage.here(one.checkpoint) as folder:
            verify_checkpoint(folder, ADAPTER)
            return read_update(folder / ADAPTER)

    def _measured(self, names: tuple[str, ...]) -> _Average | None:
        """Measure an average, if its rank is not beyond all and there is time to bring it down, too."""
        needed = 1 + (self._rank(names) > self._most_rank)
        if self._rank(names) > MAX_RANK or needed > self._left:
            return None
        return self._measure(names, partial(self._mean, names))

    def _rank(self, names: Sequence[str]) -> int:
        return sum(rank_of(self._members[name]) for name in names)

    def _mean(self, names: Sequence[str]) -> Update:
        return mean_update([self._members[name] for name in names], [1 / len(names)] * len(names))

    def _reduced(self, names: Sequence[str]) -> Update:
        mean, device = self._mean(names), self._work.bank.device
        return self._work.with_room(lambda: reduced(mean, self._most_rank, device))

    def _measure(self, names: Sequence[str], make: Callable[[], Update]) -> _Average | None:
        """Make an average of members and measure it; None where memory is too short for that."""
        self._left -= 1
        try:
            update = make()
            found = _Average(self._work.perplexities(update, self._public), rank_of(update))
        except torch.cuda.OutOfMemoryError:
            self._work.note(f"an average of rank {self._rank(names)} finds no memory: it is left out")
            return None
        self.measured += 1
        return found
