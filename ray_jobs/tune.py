"""Run a sweep of QLoRA trials and register its best adapter.

    python ray_jobs/tune.py --space search_spaces/quickstart.yaml
"""

import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qlora.config import InputError
from ray_jobs.command import PROJECT_ROOT, CommandParser, StoppedError, connect_ray, run

if TYPE_CHECKING:
    from ray_jobs.sweep_results import SweepResults
    from tuning.host import SweepData


def main() -> None:
    """Parse, validate, run, register, report."""
    parser = CommandParser(__doc__)
    parser.add_argument("--space", metavar="FILE", help="a search space, see search_spaces/")
    parser.add_argument("--name", metavar="NAME", help="of the sweep and its folder under results/ (default: the space file's)")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a dotted key of the space")
    parser.add_argument("--resume", metavar="NAME", help="continue a sweep that was stopped, with the same trials")
    parser.add_argument("--dry-run", action="store_true", help="validate, print the plan, start nothing")
    arguments = parser.parse_args()
    if arguments.resume and (arguments.space or arguments.name or arguments.set or arguments.dry_run):
        parser.error("--resume takes the sweep's own settings; give it alone")
    if not arguments.resume and not arguments.space:
        parser.error("give --space FILE, or --resume NAME")
    name = arguments.resume or arguments.name or Path(arguments.space).stem
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError("--name", f"{name!r} may hold letters, digits, dots, dashes and underscores only")

    from ray_jobs.sweep_results import SweepResults
    folder = PROJECT_ROOT / "results" / name
    results = SweepResults.reopened(folder) if arguments.resume else SweepResults.planned(folder, arguments.space, arguments.set)
    if results.summary() is None:
        data = results.load_data()
        print(f"sweep       {name}", flush=True)
        if arguments.dry_run:
            from tuning.plan import sweep_device
            print(results.plan(data, sweep_device(data.space, here=True))[1])
            return
        _run(results, data, resume=bool(arguments.resume))
    print(results.closing_words())


def _run(results: "SweepResults", data: "SweepData", *, resume: bool) -> None:
    resources = connect_ray()
    from ray_jobs.proof import prove
    from tuning.hosts import num_gpus, start_hosts, stop_hosts
    from tuning.plan import check_resources, compare_with_run, sweep_device, trial_shares
    from tuning.progress import clock, ranking
    from tuning.sweep import keep_best_adapter, run_sweep, zero_shot_perplexities
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
    tracker, status = results.tracker(device.name), "KILLED"
    try:
        with tracker.system_metrics():
            records = run_sweep(data.space, hosts, shares, results.folder, zero_shot, tracker, resume=resume)
        if len(records) < data.space.num_trials or any(record.status in ("pending", "running") for record in records):
            raise StoppedError(f"the sweep can go on: python ray_jobs/tune.py --resume {results.folder.name}")
        status, seconds = "FAILED", time.monotonic() - started
        print(f"\n{ranking(records, zero_shot)} in {clock(seconds)}", flush=True)
        print(f"{compare_with_run(plan, max(record.peak_memory_gib for record in records), seconds)}\n", flush=True)
        stop_hosts(hosts)
        best = keep_best_adapter(data.space, results.folder)
        results.register(records, best, zero_shot, tracker,
                         lambda uri, expected: prove(uri, data.space.base_model, data.public, expected, shares))
        results.publish(records, best, zero_shot, seconds, device.name, tracker)
        status = "FINISHED"
    finally:
        tracker.end(status, {"zero_shot_public_perplexity": zero_shot, "seconds": time.monotonic() - started})


if __name__ == "__main__":
    run(main)
