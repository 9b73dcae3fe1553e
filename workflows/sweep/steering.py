"""Owns what people see of a sweep from outside, and what they may ask of it while it runs.

A sweep's files tell how it stands, and orders are files (tuning.orders): nothing is started for either.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from qlora.config import InputError
from qlora.home import in_results
from tuning.ledger import Ledger, TrialRecord
from tuning.orders import MOST_ADDED, Order, Orders, give_order
from tuning.progress import headline, spending, table
from tuning.spending import spent_so_far
from tuning.strategy import Rounds
from workflows.results import open_results
from workflows.sweep.folder import SweepFolder, reopen_sweep

_WHEN = "it takes effect at the next step or, if the sweep is not running, when it goes on"


def status(name: str, now: float) -> str:
    """Describe a sweep's trials as they stand; `now`: in seconds since 1970. Raises InputError."""
    with _sweep(name) as (sweep, records):
        zero_shot = sweep.zero_shot()
        if zero_shot is None or not records:
            return f"the sweep {name} has no trial yet"
        began = min(record.started_at or now for record in records)
        ended = [record.ended_at for record in records if record.ended_at]
        until = max(ended, default=now) if all(record.has_ended for record in records) else now
        num_trials = sweep.space.num_trials + Orders(sweep.place).added
        words = [
            table(records, zero_shot, limit=len(records)),
            headline(records, num_trials, max(0.0, until - began)),
            spending(spent_so_far(sweep.folder), sweep.space.budget, sweep.space.wants_gpu),
        ]
        if sweep.summary() is not None:
            words.append(f"finished    see {in_results(name, 'summary.json')}")
        return "\n".join(words)


def ask_to_stop(name: str, trial_id: str) -> str:
    """Ask for a trial's end. Raises InputError for a trial that is unknown or has ended."""
    with _sweep(name) as (sweep, records):
        _check_is_unfinished(sweep)
        found = next((record for record in records if record.trial_id == trial_id), None)
        if found is None:
            known = ", ".join(record.trial_id for record in records if not record.has_ended)
            raise InputError("stop", f"{name} has begun no trial {trial_id}; it has {known or 'none'}")
        if found.has_ended:
            raise InputError("stop", f"trial {trial_id} has ended: it is {found.status}")
        give_order(sweep.place, Order(kind="stop", trial_id=trial_id))
        return f"asked       trial {trial_id} is to stop with what it has; {_WHEN}"


def ask_for_more(name: str, count: int) -> str:
    """Ask for more trials. Raises InputError where that can't be."""
    with _sweep(name) as (sweep, _):
        _check_is_unfinished(sweep)
        if isinstance(sweep.space.scheduler, Rounds):
            raise InputError(
                "add", "trials that are compared in rounds can't be added to; start another sweep"
            )
        added = Orders(sweep.place).added + count
        if added > MOST_ADDED:
            raise InputError("add", f"{added} are more than the {MOST_ADDED} trials that can be added")
        give_order(sweep.place, Order(kind="add", count=count))
        return f"asked       {count} more, {sweep.space.num_trials + added} trials in all; {_WHEN}"


@contextmanager
def _sweep(name: str) -> Iterator[tuple[SweepFolder, list[TrialRecord]]]:
    """Provide a sweep and its trials as they stand now, within. Raises InputError for no sweep."""
    with open_results(name) as results:
        sweep = reopen_sweep(results.path)
        yield sweep, list(Ledger(sweep.folder / "trials").records.values())


def _check_is_unfinished(sweep: SweepFolder) -> None:
    if sweep.summary() is not None:
        raise InputError(sweep.name, f"has finished, see {in_results(sweep.name, 'summary.json')}")
