"""Owns the run of a sweep's trials: Ray Tune's Tuner around `run_trial`.

Schedulers and searchers are Ray's, or ours behind its interfaces. The state of a sweep is its ledger and its
checkpoints: a sweep that goes on is a new Tuner over them (tuning.ledger_search, tuning.restored_scheduler,
tuning.round_scheduler, tuning.checkpoints).
"""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import OutOfMemoryError
from ray.tune.execution import class_cache
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from qlora.files import below
from tuning.checkpoints import RAY, Storage, go_on_from_stopped
from tuning.clone_seats import CloneSeats
from tuning.host_directory import DeviceCount, Hosts, end_trial, set_trial_aside
from tuning.ledger import Ledger, TrialRecord
from tuning.ledger_search import LedgerSearch
from tuning.objective import METRIC
from tuning.orders import MOST_ADDED, Orders
from tuning.restored_scheduler import RestoredScheduler
from tuning.round_scheduler import RoundScheduler
from tuning.screen import SweepScreen
from tuning.space import Space, tune_space
from tuning.spending import SpendingClock
from tuning.strategy import Asha, Rounds
from tuning.sweep_callback import Hand, SweepCallback, SweepObserver
from tuning.trial import run_trial

_SECONDS_TO_RECOVER = 10
_OUT_OF_BUDGET = "the budget was spent"
_RAYS_STATE = ("tuner.pkl", "trainable.pkl", "experiment_state-*.json", "*-state-*.json", "*-state-*.pkl")


@dataclass(frozen=True)
class KnownBase:
    """Holds what a sweep goes by of its base: the objective's values without an adapter, its hidden size.

    zero_shot: by prompt.
    """

    zero_shot: Mapping[str, float]
    width: int


class ShortOfMemoryError(RuntimeError):
    """Trials' processes were killed again and again, since their node had no memory left."""


def run_sweep(
    space: Space,
    hosts: Hosts,
    shares: dict[str, float],
    folder: Path,
    place: str,
    orders: Orders,
    known: KnownBase,
    num_devices: int,
    observer: SweepObserver,
    go_on: Callable[[], None] = lambda: None,
) -> list[TrialRecord]:
    """Run or continue the sweep whose results live in `folder`; returns the record of every trial.

    `place`: the path or URI below which Ray keeps checkpoints, and which all nodes reach. `shares`: what a
    trial asks Ray for. `orders`: what people ask for. `num_devices`: that trials begin on. `go_on` is called
    again and again, and raises to end the sweep.
    Trials still pending or running in the result mean that it was interrupted and can be resumed. Raises
    ShortOfMemoryError, after `max_failures` times, where Ray's monitor goes on killing trials.
    """
    ledger, storage = Ledger(folder / "trials"), Storage.at(below(place, RAY))
    for record in ledger.records.values():
        observer.trial_changed(record)  # it may have been told otherwise, or not at all
    screen = SweepScreen(space.num_trials + orders.added, known.zero_shot, space.objective)

    def num_trials() -> int:
        return space.num_trials + orders.added

    trainable = tune.with_resources(tune.with_parameters(run_trial, hosts=hosts, shares=shares), shares)
    times_left, clock = (
        space.max_failures,
        SpendingClock(space.budget, folder, num_devices, DeviceCount(hosts)),
    )
    try:
        while not all_ended(num_trials(), list(ledger.records.values()), clock.spent.is_over):
            begun = list(ledger.records.values())
            scheduler = _scheduler(space, begun, num_devices, orders)
            may_begin = scheduler.may_begin if isinstance(scheduler, RoundScheduler) else lambda number: True
            search = LedgerSearch(space, begun, storage, known.width, may_begin, orders, ledger.put)
            wish = partial(set_trial_aside, hosts, below(place, RAY))
            most, later = space.max_concurrent_trials, partial(go_on_from_stopped, storage=storage)
            scheduler.clones = CloneSeats(search, begun, wish, later, most or math.inf)
            hand = Hand(orders, search.clones, partial(end_trial, hosts))
            callback = SweepCallback(ledger, space, screen, observer, scheduler, clock, hand, go_on)
            _prepare_tune(search, folder)
            tuner = _tuner(space, place, trainable, callback, scheduler, search, clock)
            try:
                tuner.fit()
                _end_at_budget(clock, ledger, observer)
                if num_trials() <= len(ledger.records) or clock.spent.is_over:
                    screen.close(list(ledger.records.values()))
                    break  # else more trials were asked for when Ray had just ended
            except Exception as error:
                if not _is_short_of_memory(error):
                    raise
                if times_left < 1:
                    problem = "trials' processes were killed again and again, since a node had no memory left"
                    raise ShortOfMemoryError(problem) from error
                times_left -= 1  # Ray Tune ends where Ray's monitor kills a trial's process; we go on
                screen.note(["Ray's monitor killed a trial's process, since its node was short of memory"])
                for _ in range(_SECONDS_TO_RECOVER):  # or it kills again at once
                    go_on()
                    time.sleep(1)
    finally:
        clock.keep()
        screen.stop()
    return list(ledger.records.values())


def _is_short_of_memory(error: BaseException | None) -> bool:
    """Tell whether Ray's monitor killed a process: that comes as a cause of whatever Tune raises."""
    while error is not None:
        if isinstance(error, OutOfMemoryError) or OutOfMemoryError.__name__ in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def all_ended(num_trials: int, records: list[TrialRecord], is_spent: bool) -> bool:
    """Tell whether all of so many trials have ended; once the budget `is_spent`, no more begin."""
    are_all = is_spent or len(records) >= num_trials
    return are_all and all(record.has_ended for record in records)


def _end_at_budget(clock: SpendingClock, ledger: Ledger, observer: SweepObserver) -> None:
    """Record the end of the trials that the budget's end has stopped."""
    for record in list(ledger.records.values()) if clock.spent.is_over else ():
        if not record.has_ended:
            ended = replace(record, status="stopped", error=_OUT_OF_BUDGET, ended_at=time.time())
            ledger.put(ended)
            observer.trial_changed(ended)


def _prepare_tune(search: LedgerSearch, folder: Path) -> None:
    """Set what Ray Tune takes from its surroundings."""
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(search.max_pending)
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "86400"  # its state is written at the end only: nobody reads it
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # signals are the command's
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # four files a trial below /tmp: nobody reads them
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # the table and the summary tell them in a line
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # that its state could not be written, too
    # Tune would copy these keys into a record that stands in clear in a log that all users can read.
    for name in [name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]:
        class_cache.ENV_VARS_TO_PROPAGATE.discard(name)
    for pattern in _RAYS_STATE:
        for path in (folder / RAY).glob(pattern):
            path.unlink()


def _tuner(
    space: Space,
    storage: str,
    trainable: Callable[..., Any],
    callback: SweepCallback,
    scheduler: TrialScheduler,
    search: LedgerSearch,
    clock: SpendingClock,
) -> tune.Tuner:
    return tune.Tuner(
        trainable,
        param_space=tune_space(space),
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            num_samples=_most_samples(space),  # LedgerSearch knows how many there are
            search_alg=search,
            scheduler=scheduler,
            # A paused trial's process would wait for the next one; if its node dies, trials that are tried
            # again would fail once for each such process.
            reuse_actors=not isinstance(space.scheduler, Rounds),
        ),
        run_config=tune.RunConfig(
            name=RAY,
            storage_path=storage,
            callbacks=[callback],
            stop=clock,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=space.max_failures),
        ),
    )


def _most_samples(space: Space) -> int:
    """Return the samples, of the size of a grid each, that may come up with trials that are added by hand."""
    return space.num_samples + -(-MOST_ADDED * space.num_samples // space.num_trials)


def _scheduler(
    space: Space, begun: list[TrialRecord], num_devices: int, orders: Orders
) -> RestoredScheduler | RoundScheduler:
    settings = space.scheduler
    if isinstance(settings, Rounds):
        return RoundScheduler(settings, begun, space.num_trials, num_devices, orders.draws)
    if not isinstance(settings, Asha):
        return RestoredScheduler(FIFOScheduler(), [])
    options: dict[str, Any] = settings.model_dump(exclude={"type"})
    return RestoredScheduler(ASHAScheduler(**options), begun)
