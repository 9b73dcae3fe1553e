"""The course report's study for any base and data: stages, learning curve, prompts, beams; as a page and as runs of one experiment.

python ray_jobs/study.py --study studies/quick.yaml
"""

import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qlora.config import InputError
from ray_jobs.cli import CommandParser
from workflows.session import PROJECT_ROOT, connect_ray, run


def main() -> None:
    """Parse, validate, do what is not done yet, report."""
    parser = CommandParser(__doc__)
    parser.add_argument("--study", metavar="FILE", required=True, help="a study, see studies/")
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="of the study and its folder under results/studies/ (default: the file's)",
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a dotted key of the study"
    )
    arguments = parser.parse_args()
    name = arguments.name or Path(arguments.study).stem
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError("--name", f"{name!r} may hold letters, digits, dots, dashes and underscores only")

    from workflows.study.settings import load_study

    study = load_study(arguments.study, arguments.set)
    from workflows.study.page import metrics_of, study_report
    from workflows.study.steps import StudySteps

    folder = PROJECT_ROOT / "results" / "studies" / name
    steps = StudySteps(study, folder, lambda line: print(line, flush=True))
    steps.claim()
    connect_ray()
    import ray

    steps.shares["GPU"] = float(ray.cluster_resources().get("GPU", 0) > 0)
    found = steps.run()
    from reporting.study_page import write_study_report
    from tracking.runs import note_study

    page = folder / "study.html"
    chosen = sorted(random.Random(study.seed).sample(range(len(steps.public)), study.num_predictions))
    write_study_report(page, study_report(name, steps, found, chosen))
    note_study("studies", name, metrics_of(study, found), page)
    best = found["best"]
    print(
        f"\nbest        stages {best}: public perplexity {found[f'perplexity {best}']['mean']:.4f}, zero-shot "
        f"{found['perplexity zero-shot']['mean']:.4f}\nadapter     results/studies/{name}/adapters/{best} (a PEFT folder)\n"
        f"page        results/studies/{name}/study.html\ncompare     make ui, then experiment 'studies'"
    )


if __name__ == "__main__":
    run(main)
