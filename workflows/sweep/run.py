"""Owns the run of a sweep from its plan to its registered adapter, with Ray and MLflow around it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from qlora.base.reference import base_digest
from qlora.config import InputError
from qlora.data.prompts import EncodedExample
from qlora.files import below, disk_without_space
from tracking.errors import TrackingAwayError
from tuning.best_adapter import BestAdapter
from tuning.checkpoints import RAY
from tuning.device import Device
from tuning.host_directory import (
    Hosts,
    ask_where_trials_stand,
    begin_hosts,
    host_notes,
    host_seconds,
    stop_hosts,
    unfit_nodes,
    wait_until_kept,
    why_no_node_is_fit,
)
from tuning.known_devices import known_device
from tuning.ledger import Ledger, TrialRecord
from tuning.orders import Orders
from tuning.placement import this_node
from tuning.plan_text import compare_with_run, describe_plan, describe_range, time_lines
from tuning.progress import clock, ranking, spending, where_time_went
from tuning.spending import spent_so_far
from tuning.sweep import KnownBase, ShortOfMemoryError, all_ended, run_sweep
from tuning.sweep_callback import SweepObserver
from tuning.sweep_plan import SweepPlan
from workflows.cluster.nodes import Needs, check_nodes, joining
from workflows.preflight import check_room
from workflows.session import StoppedError, can_go_on, go_on, resume_with
from workflows.sweep.best import averages_are_due, find_best
from workflows.sweep.cost import SweepCost, cost_summary
from workflows.sweep.end import SweepEnd
from workflows.sweep.folder import SweepFolder
from workflows.sweep.holdout import holdout_is_due, measure_holdout
from workflows.sweep.planning import as_measured, plan_on
from workflows.sweep.prepared import PreparedSweep, SweepInputs, prepare
from workflows.sweep.registration import Found, describe, publish, register_best, summarise, track
from workflows.sweep.start import StartedHosts
from workflows.sweep.zero_shot import ask_zero_shot, zero_shot_of
from workflows.worker import Worker, prove

_SECONDS_BETWEEN_LOOKS, _SECONDS_WITHOUT_A_NODE = 5.0, 60.0
_SECONDS_TO_KEEP, _SECONDS_TO_TELL, _SECONDS_TO_CATCH_UP = 6.0, 2.0, 60.0


def show_plan(sweep: SweepFolder, inputs: SweepInputs, device: Device | None) -> None:
    """Print the plan of a sweep on one such device, and start nothing. Raises InputError if no trial fits."""
    prepared = prepare(sweep, inputs)
    plan = plan_on(prepared, [device], 1) if device else None
    print(describe_plan(prepared.space, *_longest(prepared), inputs.sets.words, plan))


def show_plan_on(sweep: SweepFolder, inputs: SweepInputs, cards: str, price: float | None) -> None:
    """Print the plan of a sweep on cards such as `H100:2`, as ranges, and start nothing.

    `price`: of a card and hour, in place of the space's. Raises InputError for a card that is not known, and
    if no trial fits.
    """
    slow, quick, count = known_device(cards)
    if not sweep.space.wants_gpu:
        raise InputError("--on", "trials of this space ask for no GPU; add --set trials_per_gpu=auto")
    prepared = prepare(sweep, inputs, needs_weights=False)
    quick_plan, slow_plan = (plan_on(prepared, [device], count) for device in (quick, slow))
    space, words = prepared.space, inputs.sets.words
    price = price or space.price_per_gpu_hour
    print(describe_range(space, *_longest(prepared), words, quick_plan, slow_plan, price))


def run_and_register(sweep: SweepFolder, inputs: SweepInputs, started: StartedHosts) -> None:
    """Run or go on with a sweep and register its best adapter.

    Raises StoppedError if it was interrupted and can go on.
    """
    hosts, prepared = started.hosts, prepare(sweep, inputs)
    sweep = replace(sweep, space=prepared.space)
    devices = _found_devices(sweep, inputs, started)
    cost = SweepCost(sweep, hosts, started.began, len(devices))
    plan = plan_on(prepared, devices, started.num_devices())
    needs = _needs(sweep, inputs, plan)
    asked = check_nodes(started.shares, needs)
    check_room(sweep.storage, int(plan.mean_disk_bytes * _share_to_come(sweep)))
    words = inputs.sets.words
    print(describe_plan(sweep.space, *_longest(prepared), words, plan, len(devices)), flush=True)
    sweep.claim(inputs.digests, inputs.prompt_text, inputs.sets)
    resume_with(sweep.how_to_go_on)
    shares = sweep.space.trial_shares(plan.trials)
    digest_task = ray.remote(num_cpus=0)(base_digest).options(scheduling_strategy=this_node())
    digest = digest_task.remote(sweep.space.base_model.name)
    if not _is_trained(sweep) or averages_are_due(sweep, prepared) or holdout_is_due(sweep, prepared):
        data = prepared.host_data(plan.budgets, plan.recomputing)
        begin_hosts(hosts, data, joining(needs, asked))
    measured = ask_zero_shot(sweep, hosts, shares)
    with _record_needed(sweep):
        tracker = track(sweep)  # while hosts measure
    status, kept = "FAILED", None
    metrics: dict[str, float] = {}
    try:
        with _record_needed(sweep):
            describe(sweep, prepared, devices[0].name, tracker)
        with tracker.system_metrics():
            zero_shot = zero_shot_of(sweep, measured)
            print(f"\nzero-shot   {zero_shot.words}", flush=True)
            metrics["zero_shot_public_perplexity"] = min(zero_shot.perplexities.values())
            if measured:
                plan, how = as_measured(plan, prepared, devices, hosts, started.began)
                lines = time_lines(sweep.space, plan, len(devices), f", {how}")
                print(*lines, sep="\n", flush=True)
            known = KnownBase(zero_shot.known, prepared.base.size.hidden)
            cost.expect(plan.gpu_seconds)
            orders = Orders(sweep.place)
            unfit = partial(unfit_nodes, hosts)
            end = SweepEnd(tracker, shares, lambda: sweep.space.num_trials + orders.added, unfit)
            records = _run_trials(sweep, hosts, shares, orders, known, started.num_devices(), end, cost)
            if not _is_run(sweep, records):
                raise StoppedError(sweep.how_to_go_on)
            worker = end.worker()
            best, averages = find_best(sweep, prepared, hosts, records)
            holdout = measure_holdout(sweep, prepared, hosts, best)
            found = Found(records, best, holdout, zero_shot, prepared.examples.prompt_of(best.record.config))
            seconds = time.monotonic() - started.began
            work = _tell_how_it_went(sweep, hosts, plan, found, averages, seconds)
            cost.look()
            stop_hosts(hosts)
            metrics |= found.metrics() | {"system/gpu_seconds": work["spent"]["gpu_seconds"]}
            with _record_needed(sweep):
                tracker.catch_up(_SECONDS_TO_CATCH_UP)
                proof = partial(_proof, worker, prepared, best)
                registered = register_best(sweep, prepared, found, tracker, ray.get(digest), proof)
                cost.end(1)  # the proof's
                metrics |= costs.metrics if (costs := cost.costs()) else {}
                work["cost"] = cost_summary(costs)
                summary = {**summarise(sweep, found, tracker, registered), **work}
                publish(sweep, prepared, summary, found, seconds, devices[0].name, tracker)
                metrics["system/seconds"] = time.monotonic() - started.began
                tracker.end("FINISHED", metrics)
        status = "FINISHED"
    except BaseException as error:
        status = "KILLED" if can_go_on(error) else "FAILED"
        if isinstance(error, StoppedError | KeyboardInterrupt):  # Ray and the disk are there for it
            kept = ask_where_trials_stand(hosts, below(sweep.storage, RAY))
        raise
    finally:
        if status != "FINISHED":
            tracker.end(status, metrics, timeout_seconds=_SECONDS_TO_TELL)
        if kept is not None:
            wait_until_kept(kept, _SECONDS_TO_KEEP)
        if status != "FINISHED":
            with suppress(OSError):  # of a full disk
                cost.end()
    sweep.finish(summary)


def _proof(
    worker: Worker, prepared: PreparedSweep, best: BestAdapter, model_uri: str, expected: float
) -> None:
    public = prepared.examples.of(best.record.config).public
    prove(worker, model_uri, prepared.space.base_model, public, expected)


def _longest(prepared: PreparedSweep) -> tuple[Sequence[EncodedExample], Sequence[EncodedExample]]:
    """Return the train and public examples under the prompt that takes most tokens, for people."""
    longest = prepared.examples.longest()
    return longest.train, longest.public


def _run_trials(
    sweep: SweepFolder,
    hosts: Hosts,
    shares: dict[str, float],
    orders: Orders,
    known: KnownBase,
    num_devices: int,
    observer: SweepObserver,
    cost: SweepCost,
) -> list[TrialRecord]:
    try:
        watch = _watch(sweep, hosts, shares, cost)
        return run_sweep(
            sweep.space,
            hosts,
            shares,
            sweep.folder,
            sweep.storage,
            orders,
            known,
            num_devices,
            observer,
            watch,
        )
    except ShortOfMemoryError as error:
        raise StoppedError(f"{error}; with more of it, or fewer trials, {sweep.how_to_go_on}") from error


def _watch(sweep: SweepFolder, hosts: Hosts, shares: dict[str, float], cost: SweepCost) -> Callable[[], None]:
    """Return a `go_on` that raises StoppedError, too, once only unfit nodes are left for a while."""
    looked = fit = time.monotonic()

    def watch() -> None:
        nonlocal looked, fit
        go_on()
        now = time.monotonic()
        if now - looked < _SECONDS_BETWEEN_LOOKS:
            return
        looked = now
        cost.look()
        if not (why := why_no_node_is_fit(hosts, shares)):
            fit = now
        elif now - fit > _SECONDS_WITHOUT_A_NODE:
            raise StoppedError(f"no node is left that can do the work ({why}); {sweep.how_to_go_on}")

    return watch


@contextmanager
def _record_needed(sweep: SweepFolder) -> Iterator[None]:
    """Stop the sweep if the tracking server is needed within and away: its results are kept."""
    try:
        yield
    except TrackingAwayError as error:
        if disk_without_space(error):  # of a store that is a file
            raise
        raise StoppedError(
            f"{error}; results are kept, and with the server back {sweep.how_to_go_on}"
        ) from error


def _is_trained(sweep: SweepFolder) -> bool:
    """Tell whether a sweep that goes on lacks its registration alone, so that no host need load the base."""
    records = Ledger(sweep.folder / "trials").records.values()
    return sweep.zero_shot() is not None and _is_run(sweep, list(records))


def _is_run(sweep: SweepFolder, records: list[TrialRecord]) -> bool:
    """Tell whether all trials have ended, those that were asked for by hand among them."""
    num_trials = sweep.space.num_trials + Orders(sweep.place).added
    return all_ended(num_trials, records, spent_so_far(sweep.folder).is_over)


def _found_devices(sweep: SweepFolder, inputs: SweepInputs, started: StartedHosts) -> list[Device]:
    """Return the devices that answered; if a host can't start, what is wrong with its node is told first."""
    try:
        return started.found_devices(sweep.space.start_timeout)
    except ray.exceptions.RayTaskError:
        check_nodes(started.shares, _needs(sweep, inputs, None))
        raise


def _share_to_come(sweep: SweepFolder) -> float:
    """Return the share of a sweep's trials that have not ended."""
    ended = sum(record.has_ended for record in Ledger(sweep.folder / "trials").records.values())
    return 1 - min(1.0, ended / sweep.space.num_trials)


def _needs(sweep: SweepFolder, inputs: SweepInputs, plan: SweepPlan | None) -> Needs:
    """Return what a node must have to run trials: a checkpoint of each is on its way at most."""
    checkpoint = plan.mean_disk_bytes // (2 * sweep.space.num_trials) if plan else 0
    most_there = max(kind.trials for kind in plan.kinds.values()) if plan else 0
    files, weights = (inputs.digests.get(role) for role in ("base_files", "base_weights"))
    return Needs(sweep.space.base_model.name, files, weights, sweep.storage, most_there * checkpoint)


def _tell_how_it_went(
    sweep: SweepFolder, hosts: Hosts, plan: SweepPlan, found: Found, averages: str, seconds: float
) -> dict[str, Any]:
    """Print the ranking, the plan beside the run, and what hosts have to say; returns the last."""
    records = found.records
    spent, notes, cost = host_seconds(hosts), host_notes(hosts), spent_so_far(sweep.folder)
    ranked = ranking(records, found.zero_shot.known, sweep.space.objective)
    print(f"\n{ranked} in {clock(seconds)}", flush=True)
    if averages:
        print(f"averages    {averages}")
    if found.holdout is not None:
        print(f"holdout     {found.holdout.words()}")
    print(compare_with_run(plan, max(record.peak_memory_gib for record in records), seconds))
    print(spending(cost, sweep.space.budget, sweep.space.wants_gpu))
    print(where_time_went(spent))
    for note in notes:
        print(f"note        {note}")
    print(flush=True)
    gpu_seconds = cost.device_seconds if sweep.space.wants_gpu else 0.0
    trials = {"minutes": cost.seconds / 60, "gpu_seconds": gpu_seconds, "was_budget": cost.is_over}
    return {"host_seconds": spent, "host_notes": notes, "spent": trials}
