"""Owns what people see of a sweep from outside, and what they may ask of it while it runs.

A sweep's files tell how it stands, and orders are files (tuning.orders): nothing is started for either.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from qlora.config import InputError, first_line, validated
from qlora.home import home_folder, in_results
from tuning.ledger import Ledger, TrialRecord
from tuning.orders import MOST_ADDED, Order, Orders, give_order
from tuning.progress import headline, spending, table
from tuning.samplers import checked_setting
from tuning.spending import spent_so_far
from workflows.lock import is_held
from workflows.results import open_results
from workflows.sweep.folder import SweepFolder, reopen_sweep

_OF_THE_ADAPTER = ("lora_r", "lora_alpha", "target_modules")
_WHEN = "it takes effect at the next step or, if the sweep is not running, when it goes on"


def status(name: str, now: float) -> str:
    """Describe a sweep's trials as they stand; `now`: in seconds since 1970. Raises InputError."""
    with _sweep(name) as (sweep, records):
        objective = sweep.space.objective
        known = sweep.zero_shot() if objective.is_perplexity else sweep.zero_shot_values()
        if not known or not records:
            return f"the sweep {name} has no trial yet"
        began = min(record.started_at or now for record in records)
        ended = [record.ended_at for record in records if record.ended_at]
        until = max(ended, default=now) if all(record.has_ended for record in records) else now
        num_trials = sweep.space.num_trials + Orders(sweep.place).added
        words = [
            table(records, known, len(records), objective),
            headline(records, num_trials, max(0.0, until - began), objective),
            spending(spent_so_far(sweep.folder), sweep.space.budget, sweep.space.wants_gpu),
        ]
        if sweep.summary() is not None:
            words.append(f"finished    see {in_results(name, 'summary.json')}")
        elif home_folder() is not None and not is_held(sweep.folder):
            words.append(f"stopped     no process of this machine works on it; {sweep.how_to_go_on}")
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
        added = _added(sweep, count)
        give_order(sweep.place, Order(kind="add", count=count))
        return f"asked       {count} more, {sweep.space.num_trials + added} trials in all; {_WHEN}"


def ask_for_clone(name: str, trial_id: str, overrides: list[str], is_warm: bool) -> str:
    """Ask for a trial with another one's settings but for `overrides`, KEY=VALUE. Raises InputError."""
    with _sweep(name) as (sweep, records):
        _check_is_unfinished(sweep)
        space = sweep.space
        source = next((record for record in records if record.trial_id == trial_id), None)
        if source is None:
            known = ", ".join(record.trial_id for record in records)
            raise InputError("clone", f"{name} has begun no trial {trial_id}; it has {known or 'none'}")
        if is_warm and not source.curve:
            raise InputError("--warm", f"trial {trial_id} has no report yet, so no adapter to begin with")
        settings = {key: source.config[key] for key in space.search}
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals or key not in settings:
                searched = ", ".join(space.search)
                raise InputError(
                    "--set", f"{override!r} must read KEY=VALUE, of what is searched: {searched}"
                )
            settings[key] = _setting(key, text)
        changed = [key for key in _OF_THE_ADAPTER if settings.get(key) != source.config.get(key)]
        if is_warm and any(key in settings for key in changed):
            raise InputError("--warm", f"an adapter keeps its {', '.join(changed)}; leave that as it is")
        validated("--set", lambda: space.trial_settings(settings))
        most = max(space.values("train_examples")) if "train_examples" in settings else 0
        if settings.get("train_examples", 0) > most:
            raise InputError("--set", f"train_examples is at most {most:g}, as in the sweep's space")
        if "prompt" in settings and settings["prompt"] not in space.prompts:
            known = ", ".join(map(str, space.prompts))
            raise InputError("--set", f"prompt {settings['prompt']} is not among the sweep's: {known}")
        added = _added(sweep, 1)
        order = Order(kind="clone", trial_id=trial_id, settings=settings, is_warm=is_warm)
        give_order(sweep.place, order)
        return f"asked       a clone of trial {trial_id}, {space.num_trials + added} trials in all; {_WHEN}"


def _setting(key: str, text: str) -> Any:
    """Return a setting as it is written on the command line. Raises InputError."""
    try:
        return checked_setting(key, yaml.safe_load(text), key)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError("--set", first_line(error)) from None


def _added(sweep: SweepFolder, count: int) -> int:
    """Return how many trials are added, with so many more. Raises InputError for too many."""
    added = Orders(sweep.place).added + count
    if added > MOST_ADDED:
        raise InputError("add", f"{added} are more than the {MOST_ADDED} trials that can be added")
    return added


@contextmanager
def _sweep(name: str) -> Iterator[tuple[SweepFolder, list[TrialRecord]]]:
    """Provide a sweep and its trials as they stand now, within. Raises InputError for no sweep."""
    with open_results(name) as results:
        sweep = reopen_sweep(results.path)
        yield sweep, list(Ledger(sweep.folder / "trials").records.values())


def _check_is_unfinished(sweep: SweepFolder) -> None:
    if sweep.summary() is not None:
        raise InputError(sweep.name, f"has finished, see {in_results(sweep.name, 'summary.json')}")
