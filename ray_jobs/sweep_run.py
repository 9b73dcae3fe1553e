"""Owns the run of a sweep from its plan to its registered adapter, with Ray and the tracking server around it."""

import time
from dataclasses import replace

from ray_jobs.command import StoppedError, connect_ray
from ray_jobs.proof import prove
from ray_jobs.sweep_results import SweepResults
from tuning.host import SweepData
from tuning.hosts import host_seconds, num_gpus, start_hosts, stop_hosts
from tuning.ledger import share_of_epochs_saved
from tuning.plan import check_resources, compare_with_run, sweep_device, trial_shares
from tuning.progress import clock, ranking, where_time_went
from tuning.sweep import keep_best_adapter, run_sweep, zero_shot_perplexities


def run_and_register(results: SweepResults, data: SweepData, *, resume: bool) -> None:
    """Run or go on with a sweep and register its best adapter. Raises StoppedError if it was interrupted and can go on."""
    resources = connect_ray()
    check_resources(trial_shares(data.space, None), resources)
    device = sweep_device(data.space, here=bool(resources) and not data.space.wants_gpu)
    plan, words = results.plan(data, device, num_gpus())
    print(words, flush=True)
    assert plan is not None and device is not None, "the device was looked at"
    shares = trial_shares(data.space, plan)
    results.claim()
    started = time.monotonic()
    hosts = start_hosts(replace(data, budget_tokens=plan.budget_tokens))
    zero_shot = results.zero_shot(lambda: zero_shot_perplexities(hosts, shares))
    print(f"\nzero-shot   public perplexity {zero_shot:.4f}", flush=True)
    tracker, status, found = results.tracker(device.name), "KILLED", {"zero_shot_public_perplexity": zero_shot}
    try:
        with tracker.system_metrics():
            records = run_sweep(data.space, hosts, shares, results.folder, zero_shot, tracker, resume=resume)
        if len(records) < data.space.num_trials or any(record.status in ("pending", "running") for record in records):
            raise StoppedError(f"the sweep can go on: python ray_jobs/tune.py --resume {results.folder.name}")
        status, seconds = "FAILED", time.monotonic() - started
        print(f"\n{ranking(records, zero_shot)} in {clock(seconds)}", flush=True)
        host_time = host_seconds(hosts)
        print(compare_with_run(plan, max(record.peak_memory_gib for record in records), seconds))
        print(where_time_went(host_time), end="\n\n", flush=True)
        stop_hosts(hosts)
        best = keep_best_adapter(data.space, results.folder)
        assert best.record.best is not None
        found |= {"best_public_perplexity": best.record.best["public_perplexity"], "epochs_saved": share_of_epochs_saved(records)}
        summary = results.register(records, best, zero_shot, tracker,
                                   lambda uri, expected: prove(uri, data.space.base_model, data.public, expected, shares))
        results.publish({**summary, "host_seconds": host_time}, records, best, zero_shot, seconds, device.name, tracker)
        status = "FINISHED"
    finally:
        tracker.end(status, {**found, "seconds": time.monotonic() - started})
