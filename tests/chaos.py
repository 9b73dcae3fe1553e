"""Kills commands before and after every durable write, lets them go on, and compares with an undisturbed run.

    make chaos

Every durable write has a name (qlora.failpoints). An undisturbed run of a scenario counts them; then, for
each name, a run is killed (SIGKILL, in whichever process comes there) before and after its first and its last
occurrence, and then it goes on as a user would have it, until it is done. What is left must be what the
undisturbed run left. After one write and before the next one of the same process is one place, if no other
process writes between them: one kill stands for both. What goes on after a kill is killed again at a later
place, up to four times in all, as spot machines do it; where that is not reached, or what is left differs,
each kill is tried alone. Kills that are done are kept in .chaos/, so that an interrupted round goes on; a
change of the code starts a new round.
"""

import argparse
import compileall
import hashlib
import json
import os
import queue
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml
from conftest import WORDS, byte_tokenizer, copy_project, tiny_model, write_course

from qlora.failpoints import VARIABLE, passages, places

ROOT = Path(__file__).resolve().parent.parent
_USE_STORE = ("tune", "study", "roll_back", "promote")
_NOTHING_BEGUN = "there is no sweep"  # so that a user starts it again
_DONE_ALREADY = "had no champion before the present one"  # of a roll-back that was killed when it was done
_MOST_RUNS = 4  # of a command until it is done, or killed again
_MOST_KILLS = 4  # one after another
_CODES = ("qlora", "tuning", "inference", "tracking", "reporting", "workflows", "ray_jobs")
_TIMING = {"seconds", "rows_per_second", "seconds_generating", "rows_per_second_generating", "host_seconds"}
_TIMING |= {"seconds_to_first_row", "peak_memory_gib", "versions", "tokens_per_second", "rows_generated"}
_TIMING |= {"tokens", "engine", "workers", "asks_another_question"}


@dataclass(frozen=True)
class Scenario:
    """A command, and what goes on with it after a kill.

    outcome: what it must have left, as JSON. needs: commands that are done before.
    """

    name: str
    command: tuple[str, ...]
    again: tuple[str, ...]
    outcome: Callable[[Path], Any]
    needs: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Case:
    """A kill: at which failpoint, before or after which occurrence."""

    scenario: str
    point: str
    place: str
    occurrence: int

    @property
    def order(self) -> str:
        """Return what qlora.failpoints takes."""
        return f"{self.point} {self.place} {self.occurrence}"

    @classmethod
    def at(cls, scenario: str, order: str) -> "Case":
        """Return the case of such an order."""
        point, place, occurrence = order.rsplit(" ", 2)
        return cls(scenario, point, place, int(occurrence))


@dataclass(frozen=True)
class Result:
    """What came of a case.

    killed_at: the case that was carried out for it. exits: of each run, a signal being negative. seconds: of
    all runs, shared among their kills. problem: empty if all is equal.
    """

    case: Case
    killed_at: Case
    exits: tuple[int, ...]
    seconds: float
    problem: str


def main() -> None:
    """Run what is not done yet, and print a table; exit with 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", choices=[one.name for one in SCENARIOS], help="only this one")
    parser.add_argument("--point", metavar="NAME", help="only kills at this failpoint")
    parser.add_argument("--sample", type=int, metavar="N", help="only so many cases of each scenario")
    parser.add_argument("--lanes", type=int, default=2, metavar="N", help="cases at once (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".chaos", help="where runs and results are kept"
    )
    arguments = parser.parse_args()
    chosen = [one for one in SCENARIOS if arguments.scenario in (None, one.name)]
    folder, began = arguments.folder / code_digest()[:12], time.monotonic()
    results = [
        result
        for scenario in chosen
        for result in run_scenario(
            scenario, folder, arguments.sample, arguments.seed, _say, arguments.lanes, arguments.point
        )
    ]
    print(table(results))
    print(f"in {(time.monotonic() - began) / 60:.0f} minutes")
    sys.exit(any(result.problem for result in results))


def run_scenario(
    scenario: Scenario,
    folder: Path,
    sample: int | None,
    seed: int,
    say: Callable[[str], None],
    lanes: int = 1,
    point: str | None = None,
) -> Iterator[Result]:
    """Run a scenario undisturbed, then each of its cases, or a sample of them; yield what came of each.

    A case at the same moment as another gets that one's result. Each lane has a project of its own at a path
    that stays the same, since stores keep absolute paths.
    """
    names = [folder / f"lane{number}" for number in range(lanes)]
    free: queue.Queue[Path] = queue.Queue()
    for lane in names:
        make_project(lane, scenario)
        free.put(lane)
    seen = undisturbed(scenario, names[0])
    same = same_moments(seen.places)
    cases = [case for case in cases_of(scenario.name, seen.counts) if point in (None, case.point)]
    if sample is not None:
        cases = random.Random(seed).sample(cases, min(sample, len(cases)))
    done = folder / f"{scenario.name}.jsonl"
    known, writing = read_results(done), threading.Lock()

    def work(chain: list[Case]) -> dict[Case, Result]:
        lane = free.get()
        try:
            found = {result.case: result for result in run_chain(scenario, chain, lane)}
        finally:
            free.put(lane)
        with writing, open(done, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(result)) + "\n" for result in found.values())
        return found

    moments = {case: Case.at(scenario.name, same.get(case.order, case.order)) for case in cases}
    with ThreadPoolExecutor(lanes) as pool:
        missing = [moment for moment in dict.fromkeys(moments.values()) if moment not in known]
        futures = {}
        for chain in chains_of(missing, seen.places):
            futures.update(dict.fromkeys(chain, pool.submit(work, chain)))
        for number, case in enumerate(cases, start=1):
            moment = moments[case]
            found = known[moment] if moment in known else futures[moment].result()[moment]
            result = replace(found, case=case, killed_at=moment)
            say(f"{scenario.name} {number}/{len(cases)}: {line_of(result)}")
            yield result


@dataclass(frozen=True)
class Undisturbed:
    """An undisturbed run: what it leaves, how often it passes each failpoint, and in which order."""

    outcome: Any
    counts: dict[str, int]
    places: list[tuple[int, str]]


def same_moments(order: list[tuple[int, str]]) -> dict[str, str]:
    """Map the place after a write to the one before the next, if that is where the same process comes next.

    A kill at either leaves the same on the disk, since nothing is written between them by any process.
    `order`: see qlora.failpoints.places.
    """
    return {
        place: after
        for (process, place), (next_process, after) in pairwise(order)
        if process == next_process and " after " in place and " before " in after
    }


def chains_of(cases: list[Case], order: list[tuple[int, str]]) -> list[list[Case]]:
    """Arrange kills in chains: what goes on after one is killed at the next, which comes later.

    Only first passages by the command's own process can follow: how often what goes on comes to a place is
    not known, and processes of Ray outlive the command by moments.
    """
    own, when = order[0][0], {place: number for number, (_, place) in enumerate(order)}
    is_own = {place: process == own for process, place in order}
    ordered = sorted(cases, key=lambda case: when[case.order])
    followers = [case for case in ordered if case.occurrence == 1 and is_own[case.order]]
    chains = [[case] for case in ordered if case not in followers]
    for chain in chains:
        start = chain[0].order
        later = [case for case in followers if when[case.order] > when[start] and is_own[start]]
        chain += _spread(later, _MOST_KILLS - 1)
        followers = [case for case in followers if case not in chain]
    num_chains = ceil(len(followers) / _MOST_KILLS)
    return chains + [followers[number::num_chains] for number in range(num_chains)]


def _spread(cases: list[Case], count: int) -> list[Case]:
    """Return at most so many cases, spread evenly."""
    return cases[:: max(1, ceil(len(cases) / count))][:count]


def undisturbed(scenario: Scenario, lane: Path) -> Undisturbed:
    """Return what an undisturbed run leaves and passes."""
    kept = lane / f"{scenario.name}.json"
    if not kept.exists():
        project = fresh(scenario, lane)
        folder = project / "failpoints"
        code = run(project, scenario.command, folder)
        assert code in (0, 4), f"the undisturbed run ended with {code}; see {project}/out.log"
        found = Undisturbed(scenario.outcome(project), passages(folder), places(folder))
        kept.write_text(json.dumps(asdict(found)), encoding="utf-8")
    content = json.loads(kept.read_text(encoding="utf-8"))
    return Undisturbed(
        content["outcome"], content["counts"], [(one, place) for one, place in content["places"]]
    )


def cases_of(scenario: str, counts: dict[str, int]) -> Iterator[Case]:
    """List the kills before and after the first and the last occurrence of each failpoint."""
    for point, count in counts.items():
        for occurrence in sorted({1, count}):
            for place in ("before", "after"):
                yield Case(scenario, point, place, occurrence)


def run_chain(scenario: Scenario, chain: list[Case], lane: Path) -> list[Result]:
    """Kill a run at the first case, what goes on at the next and so on; then compare what is left.

    A case that was not reached, and each case of a chain that left anything else, is tried alone.
    """
    expected = undisturbed(scenario, lane).outcome
    began, exits, project = time.monotonic(), list[int](), fresh(scenario, lane)
    killed: list[Case] = []
    is_done = False
    for number, case in enumerate(chain):
        folder = project / "failpoints" / str(number)  # whose counts begin anew
        is_done, more = _run_until_killed(scenario, case, project, folder, is_last=case is chain[-1])
        exits += more
        killed += [case] if (folder / "killed").exists() else []
        if is_done:
            break
    problem = "" if is_done else f"it does not end: exit codes {exits}"
    if is_done and killed:
        problem = difference(expected, json.loads(json.dumps(scenario.outcome(project))))
    if len(chain) > 1 and (problem or not killed):
        return [result for case in chain for result in run_chain(scenario, [case], lane)]
    if not killed:
        problem = problem or "the failpoint was not reached"
    if problem:
        shutil.copy(project / "out.log", lane.parent / f"{chain[0].scenario} {chain[0].order}.log")
    seconds = round((time.monotonic() - began) / max(1, len(killed)), 1)
    results = [Result(case, case, tuple(exits), seconds, problem) for case in killed or chain[:1]]
    alone = [case for case in chain if case not in {result.case for result in results}]
    return results + [result for case in alone for result in run_chain(scenario, [case], lane)]


def _run_until_killed(
    scenario: Scenario, case: Case, project: Path, folder: Path, *, is_last: bool
) -> tuple[bool, list[int]]:
    """Run or go on with a command until it is killed at a case, after the last one until it is done.

    Returns whether it is done, and exit codes.
    """
    folder.mkdir(parents=True)
    (folder / "kill").write_text(case.order, encoding="utf-8")
    exits: list[int] = []
    for _ in range(_MOST_RUNS):
        is_new = not (project / "out.log").exists() or _says(project, _NOTHING_BEGUN)
        exits.append(run(project, scenario.command if is_new else scenario.again, folder))
        if exits[-1] in (0, 4) or _says(project, _DONE_ALREADY):
            return True, exits
        if (folder / "killed").exists() and not is_last:
            break
    return False, exits


def _says(project: Path, words: str) -> bool:
    """Tell whether the last line that a project's commands printed has these words."""
    lines = (project / "out.log").read_text(encoding="utf-8").splitlines()
    return any(words in line for line in lines[-1:])


def run(project: Path, command: tuple[str, ...], failpoints: Path) -> int:
    """Run a command of a project to its end, with a folder for failpoints; returns its exit code."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(project), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "MLFLOW_TRACKING_URI": "",
        "CUDA_VISIBLE_DEVICES": "",
        VARIABLE: str(failpoints),
    }
    with open(project / "out.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, f"ray_jobs/{command[0]}.py", *command[1:]],
            cwd=project,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            return process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return 124


def fresh(scenario: Scenario, lane: Path) -> Path:
    """Make a project like the one that the scenario starts from."""
    project = lane / "run"
    shutil.rmtree(project, ignore_errors=True)
    shutil.copytree(lane / f"{scenario.name}.start", project)
    return project


def make_project(lane: Path, scenario: Scenario) -> None:
    """Make the project that a scenario starts from: a tiny base, data, spaces, and what it needs done before.

    It is made at the path where it will run, unless it is there already.
    """
    start, project = lane / f"{scenario.name}.start", lane / "run"
    if start.exists():
        return
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir(parents=True)
    copy_project(project)
    tiny_model("llama").save_pretrained(project / "base")
    byte_tokenizer().save_pretrained(project / "base")
    write_course(project)
    asked = [{"id": f"r{n}", "instruction": f"翻譯：{WORDS[n % 16]}" * (1 + n % 3)} for n in range(40)]
    asked[7]["instruction"] = "長" * 5000
    (project / "rows.json").write_text(json.dumps(asked), encoding="utf-8")
    base = {"name": str(project / "base"), "quantization": "none"}
    data = {"train": "train.json", "public": "public.json"}
    trial = {"batch_size": 4, "lora_r": 4, "lora_dropout": 0.0}
    space = {
        "base_model": base,
        "data": data,
        "trial": trial,
        "search": {"learning_rate": {"grid_search": [1e-2, 1e-3]}, "epochs": {"choice": [3]}},
        "num_samples": 1,
        "registered_model": "tiny",
        "scheduler": {"type": "fifo"},
        "resources_per_trial": {"cpu": 1},
    }
    (project / "space.yaml").write_text(yaml.safe_dump(space), encoding="utf-8")
    study = {
        "base_model": base,
        "data": data,
        "trial": {**trial, "learning_rate": 1e-2},
        "stages": ["1+1"],
        "beams": [1, 2],
        "shots": 1,
        "max_new_tokens": 4,
        "num_predictions": 2,
    }
    (project / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    compileall.compile_dir(project, quiet=2)
    if scenario.name in _USE_STORE:  # a store's schema is MLflow's to make; it takes seconds
        script = "from tracking.store import connect; connect()"
        environment = {**os.environ, "MLFLOW_TRACKING_URI": ""}
        subprocess.run([sys.executable, "-c", script], cwd=project, env=environment, check=True)
    for command in scenario.needs:
        code = run(project, command, project / "failpoints")
        assert code in (0, 4), f"{command} failed; see {project}/out.log"
    shutil.rmtree(project / "failpoints", ignore_errors=True)
    (project / "out.log").unlink(missing_ok=True)
    project.rename(start)


def tune_outcome(project: Path) -> Any:
    """Return what a sweep must have left: results, store, files."""
    summary = json.loads((project / "results/sweep/summary.json").read_text(encoding="utf-8"))
    trials = sorted(summary["trials"], key=lambda trial: trial["trial_id"])
    return {
        "trials": [
            {
                "id": trial["trial_id"],
                "config": trial["config"],
                "status": trial["status"],
                "curve": [[point["step"], _rounded(point["public_perplexity"])] for point in trial["curve"]],
            }
            for trial in trials
        ],
        "zero_shot": _rounded(summary["zero_shot"]),
        "best": [summary["best"]["trial_id"], _rounded(summary["best"]["public_perplexity"])],
        "champion": summary["champion"],
        "store": store_outcome(project),
        "left over": left_over(project),
        "adapter": (project / "results/sweep/best/adapter_model.safetensors").exists(),
    }


def store_outcome(project: Path) -> Any:
    """Return the runs, figures, versions and models of the store, without ids and times."""
    with sqlite3.connect(project / "mlruns/mlflow.db") as store:

        def rows(query: str) -> list[Any]:
            return sorted(map(list, store.execute(query).fetchall()))

        return {
            "runs": rows("select name, status, count(*) from runs group by 1, 2"),
            "points": rows(
                "select name, key, step, count(*) from metrics join runs using (run_uuid) "
                "where key in ('public_perplexity', 'epoch_public_perplexity', 'training_loss') "
                "group by 1, 2, 3"
            ),
            "versions": rows("select name, version, status, description from model_versions"),
            "aliases": rows("select name, alias, version from registered_model_aliases"),
            "history": rows("select name, key, value from registered_model_tags"),
            "models": rows(
                "select name, status, count(*) from logged_models where lifecycle_stage = 'active' "
                "group by 1, 2"
            ),
            "linked": rows(
                "select tag_key, count(*) from logged_model_tags join logged_models using (model_id) "
                "where lifecycle_stage = 'active' group by 1"
            ),
        }


def batch_outcome(project: Path) -> Any:
    """Return what a batch job must have left: three files, and nothing beside them."""
    out = project / "out"
    meta = json.loads((out / "outputs.json.meta.json").read_text(encoding="utf-8"))
    return {
        "outputs": hashlib.sha256((out / "outputs.json").read_bytes()).hexdigest(),
        "errors": json.loads((out / "outputs.json.errors.json").read_text(encoding="utf-8")),
        "meta": _without_timing(meta),
        "files": sorted(path.name for path in out.iterdir()),
        "left over": left_over(project),
    }


def registry_outcome(project: Path) -> Any:
    """Return what the registry must hold."""
    found = store_outcome(project)
    return {key: found[key] for key in ("versions", "aliases", "history", "models")}


def study_outcome(project: Path) -> Any:
    """Return what a study must have left."""
    folder = project / "results/studies/study"
    steps = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "steps").iterdir()}
    return {
        "steps": {name: _without_timing(step) for name, step in sorted(steps.items())},
        "page": (folder / "study.html").exists(),
        "store": store_outcome(project),
        "left over": left_over(project),
    }


def left_over(project: Path) -> list[str]:
    """List files that no finished work leaves."""
    found = [*project.rglob("*.part"), *project.rglob("checkpoint_stopped"), *project.rglob(".*.work")]
    return sorted(str(path.relative_to(project)) for path in found if "failpoints" not in path.parts)


def difference(expected: Any, found: Any, where: str = "") -> str:
    """Return where two outcomes differ first; empty if they don't."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            if told := difference(expected.get(key), found.get(key), f"{where}/{key}"):
                return told
        return ""
    return "" if expected == found else f"{where}: {found!r:.300} is not {expected!r:.300}"


def table(results: list[Result]) -> str:
    """Lay results out by scenario and failpoint: places, those that left all equal, seconds of a kill."""
    lines = ["", f"{'scenario':<12} {'failpoint':<34} {'places':>6} {'equal':>5} {'seconds':>8}"]
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.case.scenario, result.case.point), []).append(result)
    for (scenario, point), group in groups.items():
        equal = sum(not result.problem for result in group)
        seconds = sum(result.seconds for result in group) / len(group)
        lines.append(f"{scenario:<12} {point:<34} {len(group):>6} {equal:>5} {seconds:>8.1f}")
    equal = sum(not result.problem for result in results)
    kills = len({result.killed_at for result in results})
    lines.append(f"{equal} of {len(results)} places, by {kills} kills, left what an undisturbed run leaves")
    return "\n".join(lines)


def line_of(result: Result) -> str:
    """Describe a result in a line."""
    exits = ", ".join(map(str, result.exits))
    alone = result.case == result.killed_at
    what = f"exits {exits}, {result.seconds} s" if alone else f"as {result.killed_at.order}"
    return f"{result.case.order}: {what}, {result.problem or 'equal'}"


def read_results(path: Path) -> dict[Case, Result]:
    """Read the results that an earlier round kept; a cut line is left out."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        case = Case(**content["case"])
        found[case] = Result(case, case, tuple(content["exits"]), content["seconds"], content["problem"])
    return found


def code_digest() -> str:
    """Return the SHA-256 (hexadecimal) of the project's code and of this file."""
    digest = hashlib.sha256()
    files = [path for room in _CODES for path in sorted((ROOT / room).rglob("*.py"))]
    for path in [*files, Path(__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _say(line: str) -> None:
    print(line, flush=True)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _without_timing(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_timing(value) for key, value in content.items() if key not in _TIMING}
    return _rounded(content) if isinstance(content, float) else content


_TUNE = ("tune", "--space", "space.yaml", "--name", "sweep")
_INFER = ("batch_infer", "--base-model", "base", "--quantization", "none", "--input", "rows.json")
_INFER += ("--output", "out/outputs.json", "--max-new-tokens", "4")
_WORSE = ("tune", "--space", "space.yaml", "--name", "worse", "--set", "search.epochs={choice: [1]}")
_BACK, _ON = ("promote", "tiny", "--roll-back"), ("promote", "tiny", "--version", "2")
_STUDY = ("study", "--study", "study.yaml", "--name", "study")
SCENARIOS = (
    Scenario("tune", _TUNE, ("tune", "--resume", "sweep"), tune_outcome),
    Scenario("batch_infer", _INFER, (*_INFER, "--resume"), batch_outcome),
    Scenario("study", _STUDY, _STUDY, study_outcome),
    Scenario("roll_back", _BACK, _BACK, registry_outcome, needs=(_WORSE, _TUNE)),
    Scenario("promote", _ON, _ON, registry_outcome, needs=(_WORSE, _TUNE, _BACK)),
)

if __name__ == "__main__":
    main()
