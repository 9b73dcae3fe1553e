"""Run a sweep of QLoRA trials and register its best adapter.

python ray_jobs/tune.py --space search_spaces/quickstart.yaml
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qlora.config import InputError
from ray_jobs.cli import CommandParser
from workflows.session import PROJECT_ROOT, run


def main() -> None:
    """Parse, validate, run, register, report."""
    parser = CommandParser(__doc__)
    parser.add_argument("--space", metavar="FILE", help="a search space, see search_spaces/")
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="of the sweep and its folder under results/ (default: the space file's)",
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a dotted key of the space"
    )
    parser.add_argument(
        "--continue-from",
        metavar="ADAPTER",
        help="start trials from this adapter, whose r, alpha and layers they keep",
    )
    parser.add_argument(
        "--resume", metavar="NAME", help="continue a sweep that was stopped, with the same trials"
    )
    parser.add_argument("--dry-run", action="store_true", help="validate, print the plan, start nothing")
    arguments = parser.parse_args()
    if arguments.resume and (
        arguments.space or arguments.name or arguments.set or arguments.dry_run or arguments.continue_from
    ):
        parser.error("--resume takes the sweep's own settings; give it alone")
    if not arguments.resume and not arguments.space:
        parser.error("give --space FILE, or --resume NAME")
    name = arguments.resume or arguments.name or Path(arguments.space).stem
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError("--name", f"{name!r} may hold letters, digits, dots, dashes and underscores only")

    from workflows.sweep.folder import SweepFolder

    folder = PROJECT_ROOT / "results" / name
    sweep = (
        SweepFolder.reopened(folder)
        if arguments.resume
        else SweepFolder.planned(folder, arguments.space, arguments.set, arguments.continue_from)
    )
    if sweep.summary() is None:
        sweep.check()
        print(f"sweep       {name}", flush=True)
        if arguments.dry_run:
            from tuning.device import device_here
            from workflows.sweep.registration import SweepResults

            results = SweepResults.of(sweep)
            print(results.plan(results.load_data(), device_here(sweep.space))[1])
            return
        from workflows.sweep.start import start

        # hosts load their libraries while this process loads its own
        started = start(sweep.space)
        from workflows.sweep.registration import SweepResults
        from workflows.sweep.run import run_and_register

        run_and_register(SweepResults.of(sweep), started, resume=bool(arguments.resume))
    print(sweep.closing_words())


if __name__ == "__main__":
    run(main)
