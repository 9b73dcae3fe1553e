"""Owns the run of a sweep from its plan to its registered adapter, with Ray and the tracking server around it."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ray

from qlora.base.reference import base_digest
from tuning.host_directory import ask_all_devices, begin_hosts, host_seconds, num_gpus, stop_hosts, this_node
from tuning.ledger import share_of_epochs_saved
from tuning.plan import compare_with_run
from tuning.progress import clock, ranking, where_time_went
from tuning.shares import trial_shares
from tuning.sweep import keep_best_adapter, run_sweep
from workflows.session import StoppedError
from workflows.sweep.registration import SweepResults
from workflows.sweep.start import StartedHosts
from workflows.worker import Worker, prove


def run_and_register(results: SweepResults, started: StartedHosts, *, resume: bool) -> None:
    """Run or go on with a sweep and register its best adapter. Raises StoppedError if it was interrupted and can go on."""
    hosts, data = started.hosts, results.load_data()
    device = min(ray.get(started.devices), key=lambda device: device.free_bytes)
    plan, words = results.plan(data, device, num_gpus())
    print(words, flush=True)
    assert plan is not None, "there is a device"
    shares = trial_shares(data.space, plan.trials)
    results.claim()
    digest = (
        ray.remote(num_cpus=0)(base_digest)
        .options(scheduling_strategy=this_node())
        .remote(data.space.base_model.name)
    )
    begin_hosts(hosts, replace(data, budget_tokens=plan.budget_tokens))
    with ThreadPoolExecutor(1) as aside:
        measured = aside.submit(
            results.zero_shot, lambda: ray.get(ask_all_devices(hosts, shares, "zero_shot"))[0]
        )
        tracker = results.tracker(device.name)
    status, found = "FAILED", {}
    try:
        with tracker.system_metrics():
            zero_shot = found["zero_shot_public_perplexity"] = measured.result()
            print(f"\nzero-shot   public perplexity {zero_shot:.4f}", flush=True)
            records = run_sweep(data.space, hosts, shares, results.folder, zero_shot, tracker, resume=resume)
            if len(records) < data.space.num_trials or any(
                record.status in ("pending", "running") for record in records
            ):
                raise StoppedError(
                    f"the sweep can go on: python ray_jobs/tune.py --resume {results.folder.name}"
                )
            worker = Worker(shares)  # which loads its libraries meanwhile
            seconds = time.monotonic() - started.began
            print(f"\n{ranking(records, zero_shot)} in {clock(seconds)}", flush=True)
            host_time = host_seconds(hosts)
            print(compare_with_run(plan, max(record.peak_memory_gib for record in records), seconds))
            print(where_time_went(host_time), end="\n\n", flush=True)
            stop_hosts(hosts)
            best = keep_best_adapter(data.space, results.folder)
            assert best.record.best is not None
            found |= {
                "best_public_perplexity": best.record.best["public_perplexity"],
                "epochs_saved": share_of_epochs_saved(records),
            }
            summary = results.register(
                records,
                best,
                zero_shot,
                tracker,
                ray.get(digest),
                lambda uri, expected: prove(worker, uri, data.space.base_model, data.public, expected),
            )
        results.publish(
            {**summary, "host_seconds": host_time}, records, best, zero_shot, seconds, device.name, tracker
        )
        status = "FINISHED"
    except (StoppedError, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        tracker.end(status, {**found, "seconds": time.monotonic() - started.began})
