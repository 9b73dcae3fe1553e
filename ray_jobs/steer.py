"""Look at a sweep that runs, and steer it, from another terminal or machine that reaches its home.

python ray_jobs/steer.py NAME status
python ray_jobs/steer.py NAME stop TRIAL
python ray_jobs/steer.py NAME add N
python ray_jobs/steer.py NAME clone TRIAL --set learning_rate=3e-4 [--warm]
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workflows.stopping import leave_at_signals

if __name__ == "__main__":
    leave_at_signals()  # while the rest loads

from ray_jobs.cli import CommandParser, folder_name
from workflows.session import run


def main() -> None:
    """Parse, ask, tell."""
    parser = CommandParser(__doc__)
    parser.add_argument("name", metavar="NAME", help="a sweep of the home")
    parser.add_argument("wish", choices=("status", "stop", "add", "clone"), help="what to do")
    parser.add_argument("value", nargs="?", metavar="TRIAL | N", help="which trial, or how many more")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="of a clone: a searched setting that is to be another",
    )
    parser.add_argument(
        "--warm", action="store_true", help="of a clone: begin with the adapter as TRIAL has it"
    )
    arguments = parser.parse_args()
    if (arguments.wish == "status") != (arguments.value is None):
        parser.error("give status, stop TRIAL, add N, or clone TRIAL")
    if arguments.wish != "clone" and (arguments.overrides or arguments.warm):
        parser.error("--set and --warm go with clone")
    if arguments.wish == "add" and not (arguments.value.isdecimal() and int(arguments.value) > 0):
        parser.error(f"add {arguments.value}: give a whole number of at least 1")
    name = folder_name(arguments.name, "NAME")
    from workflows.sweep.steering import ask_for_clone, ask_for_more, ask_to_stop, status

    if arguments.wish == "status":
        print(status(name, time.time()))
    elif arguments.wish == "stop":
        print(ask_to_stop(name, arguments.value))
    elif arguments.wish == "clone":
        print(ask_for_clone(name, arguments.value, arguments.overrides, arguments.warm))
    else:
        print(ask_for_more(name, int(arguments.value)))


if __name__ == "__main__":
    run(main)
