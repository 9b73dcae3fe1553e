"""Owns the way from ended trials to the adapter that is registered: averages are tried, the best is kept."""

from collections.abc import Sequence
from typing import Any

import ray

from qlora.checkpoint_files import CheckpointError
from qlora.config import first_line
from qlora.files import below
from tuning.best_adapter import BestAdapter, NoTrialSucceededError, keep_best_adapter
from tuning.checkpoints import RAY, Storage
from tuning.host_directory import Hosts, ask_a_host
from tuning.ledger import Ledger, TrialRecord
from tuning.soup import Finalist, Soup, affordable_averages, finalists, keep_soup, kept_soup
from workflows.session import FailedError, StoppedError, go_on
from workflows.sweep.folder import SweepFolder
from workflows.sweep.prepared import PreparedSweep

_SECONDS_BETWEEN_LOOKS = 0.5


def find_best(
    sweep: SweepFolder, prepared: PreparedSweep, hosts: Hosts, records: Sequence[TrialRecord]
) -> tuple[BestAdapter, str]:
    """Return the best adapter of a sweep whose trials have ended, and what people are told of averages.

    Averages that can't be measured cost nothing but themselves. Raises FailedError if no trial has an
    adapter, StoppedError if the best one's checkpoint is damaged.
    """
    soup, words = _soup(sweep, prepared, hosts, records)
    try:
        best = keep_best_adapter(sweep.folder, sweep.storage, soup)
    except NoTrialSucceededError as error:
        raise FailedError(f"{error}; nothing is registered") from error
    except CheckpointError as error:
        raise StoppedError(f"{error}; its trial goes on from the one before: {sweep.how_to_go_on}") from error
    return best, words or (_words(soup, best) if soup is not None else "")


def answer_of(hosts: Hosts, question: str, *arguments: Any) -> Any:
    """Ask a host and wait for its answer, unless the command is to end. Raises RayError if it fails."""
    asked = ask_a_host(hosts, question, *arguments)
    while not ray.wait([asked], timeout=_SECONDS_BETWEEN_LOOKS)[0]:
        go_on()
    return ray.get(asked)


def averages_are_due(sweep: SweepFolder, prepared: PreparedSweep) -> bool:
    """Tell whether a sweep whose trials have ended has averages to measure, for which it needs hosts."""
    records = list(Ledger(sweep.folder / "trials").records.values())
    found, most = _finalists(sweep, prepared, records)
    return len(found) > 1 and most > 0 and kept_soup(sweep.folder, found) is None


def _finalists(
    sweep: SweepFolder, prepared: PreparedSweep, records: Sequence[TrialRecord]
) -> tuple[list[Finalist], int]:
    """Return the trials that may be members, and how many averages may be measured."""
    if not (sweep.space.soup and sweep.space.objective.is_perplexity):
        return [], 0
    found = finalists(records, prepared.examples, Storage.at(below(sweep.storage, RAY)))
    return found, affordable_averages(records, prepared.examples)


def _soup(
    sweep: SweepFolder, prepared: PreparedSweep, hosts: Hosts, records: Sequence[TrialRecord]
) -> tuple[Soup | None, str]:
    """Return what averaging came to; if nothing was measured, none and why, for people."""
    found, most = _finalists(sweep, prepared, records)
    if len(found) < 2:
        return None, ""
    if most < 1:
        return None, "none is measured: it would take too much of so short a sweep"
    soup = kept_soup(sweep.folder, found)
    if soup is None:
        try:
            soup, adapter = answer_of(hosts, "soup", below(sweep.storage, RAY), found, most)
        except ray.exceptions.RayError as error:
            return None, f"can't be measured: {first_line(getattr(error, 'cause', None) or error)}"
        keep_soup(sweep.folder, soup, adapter)
    return soup, ""


def _words(soup: Soup, best: BestAdapter) -> str:
    cost = f"{soup.measured} measured in {soup.seconds:.1f} s"
    if best.soup is None:
        return f"none is better than the best trial ({cost})"
    assert best.record.best is not None
    gain = 1 - best.public_perplexity / best.record.best["public_perplexity"]
    rank = f"rank {soup.rank}" + (f", which costs {soup.lost:.2%}" if soup.lost else "")
    return (
        f"of {', '.join(soup.weights)}: public perplexity {best.public_perplexity:.4f}, {gain:.2%} below the "
        f"best trial's; {len(soup.members)} checkpoints, {rank} ({cost})"
    )
