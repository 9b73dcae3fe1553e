"""Run a sweep of QLoRA trials and register its best adapter.

python ray_jobs/tune.py --space search_spaces/quickstart.yaml
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workflows.stopping import leave_at_signals

if __name__ == "__main__":
    leave_at_signals()  # while the rest loads

from qlora.config import InputError
from qlora.files import remove_unfinished
from ray_jobs.cli import CommandParser, folder_name, positive_number
from tracking.address import check_reachable
from workflows.preflight import check_temporary_folder, check_writable, store_folders
from workflows.results import STUDIES, Results, open_results
from workflows.session import run

if TYPE_CHECKING:
    from workflows.sweep.folder import SweepFolder


def main() -> None:
    """Parse, validate, run, register, report."""
    arguments = _arguments()
    from workflows.sweep.folder import plan_sweep, reopen_sweep

    option = "--resume" if arguments.resume else "--name"
    name = folder_name(arguments.resume or arguments.name or Path(arguments.space).stem, option)
    if name == STUDIES:
        raise InputError(option, f"{name} is the folder of studies; choose another name")
    with open_results(name) as results:
        if arguments.resume:
            sweep = reopen_sweep(results.path)
        else:
            sweep = plan_sweep(results.path, arguments.space, arguments.set, arguments.continue_from)
        if arguments.dry_run:
            _show_plan(sweep, arguments.on, arguments.price)
            return
        if sweep.summary() is None:
            _run(sweep, results)
        from workflows.sweep.closing import closing_words

        summary = sweep.summary()
        assert summary is not None, "the sweep is finished"
        print(closing_words(sweep, summary))


def _show_plan(sweep: "SweepFolder", cards: str | None, price: float | None) -> None:
    """Print the plan of a sweep on this machine's device or, if any are named, on cards; start nothing."""
    from workflows.sweep.prepared import read_inputs

    inputs = read_inputs(sweep, needs_weights=cards is None)
    print(f"sweep       {sweep.name}", flush=True)
    from workflows.sweep.run import show_plan, show_plan_on

    if cards is not None:
        show_plan_on(sweep, inputs, cards, price)
    else:
        from tuning.device import device_here

        show_plan(sweep, inputs, device_here(sweep.space))


def _run(sweep: "SweepFolder", results: Results) -> None:
    """Run or go on with a sweep."""
    from workflows.sweep.folder import reopen_sweep
    from workflows.sweep.prepared import read_inputs

    inputs = read_inputs(sweep)
    print(f"sweep       {sweep.name}", flush=True)
    from workflows.sweep.start import start

    check_writable(results.path, *store_folders())
    check_reachable()
    check_temporary_folder()
    with results.held(sweep.space.storage and sweep.storage):
        sweep.check_free()  # another command may have been here just before
        if sweep.digests and reopen_sweep(results.path).sweep_id != sweep.sweep_id:
            raise InputError("--resume", f"{sweep.name} was removed and begun anew meanwhile; try again")
        if sweep.summary() is None:
            remove_unfinished(results.path)
            started = start(sweep.space)  # hosts load their libraries while this process loads its own
            from workflows.sweep.run import run_and_register

            run_and_register(sweep, inputs, started)


def _arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--space", metavar="FILE", help="what is searched, on which base and data; see search_spaces/"
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="of the sweep and its folder under results/ (default: the space file's)",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a dotted key of the space, such as num_samples=4; may be given several times",
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
    parser.add_argument(
        "--on",
        metavar="CARD[:N]",
        help="with --dry-run: plan for N cards of this kind, which need not be here, such as H100:2, "
        "A100-80G, A10G, L4 or RTX4090; the base may be a folder with its config and tokenizer alone",
    )
    parser.add_argument(
        "--price",
        type=positive_number,
        metavar="P",
        help="with --on: what a card costs an hour, in any currency (default: the space's own price)",
    )
    arguments = parser.parse_args()
    if arguments.on and not arguments.dry_run:
        parser.error("--on is a card to plan for; give --dry-run, too")
    if arguments.price and not arguments.on:
        parser.error("--price is of a card; give --on, too")
    others = (arguments.space, arguments.name, arguments.set, arguments.dry_run, arguments.continue_from)
    if arguments.resume and any(others):
        parser.error("--resume takes the sweep's own settings; give it alone")
    if not arguments.resume and not arguments.space:
        parser.error("give --space FILE, or --resume NAME")
    return arguments


if __name__ == "__main__":
    run(main)
