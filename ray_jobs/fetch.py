"""The sweeps and studies of the home, $QLORA_HOME: list them, bring one here, or remove one.

python ray_jobs/fetch.py --list
python ray_jobs/fetch.py quickstart --to FOLDER
python ray_jobs/fetch.py --remove quickstart
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workflows.stopping import leave_at_signals

if __name__ == "__main__":
    leave_at_signals()  # while the rest loads

from qlora.home import RESULTS, expanded, home_place
from ray_jobs.cli import CommandParser, aligned, folder_name
from workflows.preflight import check_writable
from workflows.results import STUDIES
from workflows.session import run

if TYPE_CHECKING:
    from workflows.kept_results import Kept

_HEAD = ["name", "state", "best public ppl", "size", "changed (UTC)"]


def main() -> None:
    """Parse, act, tell."""
    parser = CommandParser(__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a sweep, or studies/NAME")
    parser.add_argument("--to", metavar="FOLDER", help="where NAME is brought, without its checkpoints")
    parser.add_argument("--list", action="store_true", help="show what the home keeps")
    parser.add_argument(
        "--remove", metavar="NAME", help="remove a sweep with its checkpoints; runs and versions stay"
    )
    arguments = parser.parse_args()
    if sum((bool(arguments.name), arguments.list, bool(arguments.remove))) != 1:
        parser.error("give NAME with --to FOLDER, or --list, or --remove NAME")
    if bool(arguments.name) != bool(arguments.to):
        parser.error("NAME and --to FOLDER go together")
    from workflows.kept_results import fetch, kept_results, remove

    if arguments.list:
        rows = [_cells(one) for one in kept_results()]
        print(aligned([_HEAD, *rows]) if rows else f"nothing is kept under {home_place(RESULTS)}")
    elif arguments.remove:
        name = _checked(arguments.remove, "--remove")
        left = remove(name)
        print(f"removed     {home_place(RESULTS, *name.split('/'))}")
        if left:
            print(f"note        {left}")
    else:
        target = expanded(arguments.to)
        check_writable(target)
        print(f"fetched     {fetch(_checked(arguments.name, 'NAME'), target)}")


def _checked(name: str, option: str) -> str:
    """Return the name of a sweep or, as studies/NAME, of a study. Raises InputError for any other."""
    first, slash, rest = name.partition("/")
    if slash and first == STUDIES:
        return f"{STUDIES}/{folder_name(rest, option)}"
    return folder_name(name, option)


def _cells(kept: "Kept") -> list[str]:
    best = "-" if kept.best is None else f"{kept.best:.5g}"
    changed = time.strftime("%Y-%m-%d %H:%M", time.gmtime(kept.changed))
    return [kept.name, kept.state, best, f"{kept.num_bytes / 2**20:.1f} MiB", changed]


if __name__ == "__main__":
    run(main)
