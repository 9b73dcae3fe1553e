"""The versions of a registered model: compare them, promote one to champion, or go back.

python ray_jobs/promote.py quickstart
python ray_jobs/promote.py quickstart --version 3
python ray_jobs/promote.py quickstart --roll-back
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workflows.stopping import leave_at_signals

if __name__ == "__main__":
    leave_at_signals()  # while the rest loads

from ray_jobs.cli import CommandParser, aligned, positive_int
from workflows.session import run

_COLUMNS = {
    "version": "version",
    "aliases": "aliases",
    "public_perplexity": "public ppl",
    "zero_shot_public_perplexity": "zero-shot",
    "objective": "objective",
    "objective_value": "its value",
    "public_digest": "measured on",
    "base_model": "base",
    "sweep": "sweep",
    "trial_id": "trial",
}


def main() -> None:
    """Parse, act, list."""
    parser = CommandParser(__doc__)
    parser.add_argument("name", metavar="NAME", help="a registered model")
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument(
        "--version",
        type=positive_int,
        metavar="N",
        help="make it champion if it is better on the same public examples",
    )
    wish.add_argument(
        "--roll-back", action="store_true", help="give the alias back to the champion before the present one"
    )
    arguments = parser.parse_args()
    from tracking.registry import promote, roll_back, versions

    if arguments.version or arguments.roll_back:
        found = (
            promote(arguments.name, str(arguments.version))
            if arguments.version
            else roll_back(arguments.name)
        )
        print(f"{found.model_uri} is {'champion' if found.is_champion else 'not champion'}: {found.reason}\n")
    print(table(versions(arguments.name)))


def table(versions: list[dict[str, str]]) -> str:
    """Versions side by side; only those with the same `measured on` can be compared."""
    judged = any("objective" in version for version in versions)
    columns = [key for key in _COLUMNS if judged or not key.startswith("objective")]
    rows = [[_COLUMNS[key] for key in columns]]
    rows += [[_cell(key, version.get(key, "-")) for key in columns] for version in versions]
    return aligned(rows)


def _cell(key: str, value: str) -> str:
    if key.endswith("perplexity") and value != "-":
        return f"{float(value):.5g}"
    return value[:12] if key == "public_digest" else value


if __name__ == "__main__":
    run(main)
