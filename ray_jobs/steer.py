"""Look at a sweep that runs, and steer it, from another terminal or machine that reaches its home.

python ray_jobs/steer.py NAME status
python ray_jobs/steer.py NAME stop TRIAL
python ray_jobs/steer.py NAME add N
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
    parser.add_argument("wish", choices=("status", "stop", "add"), help="what to do")
    parser.add_argument("value", nargs="?", metavar="TRIAL | N", help="which trial, or how many more")
    arguments = parser.parse_args()
    if (arguments.wish == "status") != (arguments.value is None):
        parser.error("give status, stop TRIAL, or add N")
    if arguments.wish == "add" and not (arguments.value.isdecimal() and int(arguments.value) > 0):
        parser.error(f"add {arguments.value}: give a whole number of at least 1")
    name = folder_name(arguments.name, "NAME")
    from workflows.sweep.steering import ask_for_more, ask_to_stop, status

    if arguments.wish == "status":
        print(status(name, time.time()))
    elif arguments.wish == "stop":
        print(ask_to_stop(name, arguments.value))
    else:
        print(ask_for_more(name, int(arguments.value)))


if __name__ == "__main__":
    run(main)
