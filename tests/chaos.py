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
import hashlib
import json
import queue
import random
import shutil
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

from chaos_scenarios import SCENARIOS, Scenario, fresh, make_project, run

from qlora.failpoints import passages, places

ROOT = Path(__file__).resolve().parent.parent
_NOTHING_BEGUN = "there is no sweep"  # so that a user starts it again
_DONE_ALREADY = "had no champion before the present one"  # of a roll-back that was killed when it was done
_MOST_RUNS = 4  # of a command until it is done, or killed again
_MOST_KILLS = 4  # one after another
_CODES = ("qlora", "tuning", "inference", "tracking", "reporting", "workflows", "ray_jobs")


@dataclass(frozen=True)
class Case:
    """Name a kill: at which failpoint, before or after which occurrence."""

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
    """Record what came of a case.

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
    """Return the SHA-256 (hexadecimal) of the project's code and of the harness."""
    digest = hashlib.sha256()
    files = [path for room in _CODES for path in sorted((ROOT / room).rglob("*.py"))]
    for path in [*files, *sorted(Path(__file__).parent.glob("chaos*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
