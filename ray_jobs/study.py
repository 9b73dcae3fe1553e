"""The course report's study for any base and data: stages, prompts, beams; as a page and as runs.

python ray_jobs/study.py --study studies/quick.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workflows.stopping import leave_at_signals

if __name__ == "__main__":
    leave_at_signals()  # while the rest loads

from qlora.files import remove_unfinished
from ray_jobs.cli import CommandParser, folder_name
from tracking.address import check_reachable
from workflows.preflight import check_temporary_folder, check_writable, store_folders
from workflows.results import STUDIES, open_results
from workflows.session import connect_ray, go_on, resume_with, run


def main() -> None:
    """Parse, validate, do what is not done yet, report."""
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--study", metavar="FILE", required=True, help="lineages, prompts and beams to compare; see studies/"
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="of the study and its folder under results/studies/ (default: the study file's)",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a dotted key of the study, such as shots=2; may be given several times",
    )
    arguments = parser.parse_args()
    name = folder_name(arguments.name or Path(arguments.study).stem)

    from workflows.study.settings import load_study

    study = load_study(arguments.study, arguments.set)
    from workflows.study.page import publish_study
    from workflows.study.place import place_of_steps
    from workflows.study.steps import StudySteps, prepare_study

    prepared = prepare_study(study)
    with open_results(STUDIES, name) as results:
        steps = StudySteps(prepared, results.path, _say)
        check_writable(results.path, *store_folders())
        check_reachable()
        check_temporary_folder()
        with results.held():
            remove_unfinished(results.path)
            study_id = steps.claim()
            resume_with("the study can go on: run the same command again")
            found = steps.run(place_of_steps(study, prepared.digests, connect_ray()))
            print(publish_study(name, study_id, results.path, prepared, found))


def _say(line: str) -> None:
    """Show that a step is done, if the next one may begin."""
    print(line, flush=True)
    go_on()


if __name__ == "__main__":
    run(main)
