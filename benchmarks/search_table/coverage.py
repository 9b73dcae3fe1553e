"""How often the report's interval for unseen data holds, on sweeps that are drawn from the search table.

    python benchmarks/search_table/coverage.py [--replays 1000]

A replay draws trials, and as many public examples, with replacement, as a data set has; it chooses the best
trial on them, and asks whether its mean over all 750 examples lies in the interval. The plain interval is the
bootstrap's of the chosen trial alone, which forgets that it was chosen.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.report import print_report
from benchmarks.search_table.table import read_table
from reporting.intervals import bootstrap_interval, expect_unseen

_CASES = ((8, 250), (16, 250), (32, 250), (16, 60), (16, 16))  # trials, public examples
_DRAWS = 1000


def main() -> None:
    """Replay and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replays", type=int, default=1000)
    replays = parser.parse_args().replays
    found = {}
    for trials, examples in _CASES:
        held = coverage(trials, examples, replays)
        found[f"{trials} trials, {examples} examples"] = held
        print(f"{trials} trials, {examples} examples: {held['ours']:.1%}, plain {held['plain']:.1%}")
    least = {kind: min(one[kind] for one in found.values()) for kind in ("ours", "plain")}
    print_report(
        "interval_coverage",
        ours=least["ours"],
        baseline=least["plain"],
        unit="share of replays whose interval holds, in the worst case",
        settings={"replays": replays, "draws": _DRAWS, "nominal": 0.95, "cases": found},
        higher_is_better=True,
    )


def coverage(trials: int, examples: int, replays: int) -> dict[str, float]:
    """Return the share of replays in which our interval holds, and the plain one."""
    rows = [row for row in read_table().rows if row.ends]
    values = np.array([(*row.ends[-1].public, *row.ends[-1].unseen) for row in rows])
    generator, held = np.random.default_rng(0), {"ours": 0, "plain": 0}
    for _ in range(replays):
        drawn = values[generator.choice(len(values), trials, replace=False)]
        public = drawn[:, generator.integers(0, drawn.shape[1], examples)]
        best = int(public.mean(axis=1).argmin())
        truth = drawn[best].mean()
        ours = expect_unseen(public.tolist(), best, _DRAWS)
        low, high = bootstrap_interval(public[best].tolist(), _DRAWS)
        held["ours"] += ours.low <= truth <= ours.high
        held["plain"] += low <= truth <= high
    return {kind: count / replays for kind, count in held.items()}


if __name__ == "__main__":
    main()
