"""Searchers and schedulers played against the search table: GPU-seconds until they are near its best.

    python benchmarks/search.py [--seeds 1000]

On a CPU, in minutes; nothing is trained. Configurations of the table are split in two halves: what is
designed here is designed on one (--half design) and judged on the other. Each searcher goes on until it has
found the half's best, or has had all of the half's configurations. Told are the GPU-seconds until the best
public perplexity is within 1 % of the half's best. The baseline is random search under ASHA, with four rungs
and one trial of four going on; ours is the last one named.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import optuna
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from benchmarks.report import print_report
from benchmarks.search_table import make
from benchmarks.search_table.regret import draw, summary, worst_ratio
from benchmarks.search_table.replay import Costs, Played, play
from benchmarks.search_table.table import Row, read_table
from tuning.objective import METRIC
from tuning.prior_search import PriorSearcher
from tuning.round_scheduler import RoundScheduler
from tuning.space import Space, tune_space
from tuning.strategy import Asha, Rounds

_MOST_SECONDS = 3000.0
_WIDTH = 576  # of the table's base
_ASHA = Asha(grace_period=6.25, reduction_factor=4)


class RandomSearch(Searcher):
    """Independent draws."""

    def __init__(self, space: dict[str, Any], seed: int):
        super().__init__(METRIC, "min")
        self._space, self._random = space, np.random.RandomState(seed)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the next draw."""
        return {key: domain.sample(random_state=self._random) for key, domain in self._space.items()}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Learn nothing."""


class TpeHyperband(Searcher):
    """Optuna's own: TPE that is told of pruned trials as pruned, under its Hyperband.

    Its study stops trials, too, through `Pruning`.
    """

    def __init__(self, space: dict[str, Any], seed: int):
        super().__init__(METRIC, "min")
        self.study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
            pruner=optuna.pruners.HyperbandPruner(min_resource=6, max_resource=100, reduction_factor=4),
        )
        self._space = OptunaSearch.convert_search_space(space)
        self.trials: dict[str, optuna.Trial] = {}
        self.pruned: set[str] = set()

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Ask the study."""
        self.trials[trial_id] = self.study.ask(self._space)
        return dict(self.trials[trial_id].params)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Tell the study, of a pruned trial that it is one."""
        pruned = trial_id in self.pruned
        state = optuna.trial.TrialState.PRUNED if pruned else optuna.trial.TrialState.COMPLETE
        self.study.tell(self.trials[trial_id], None if pruned else result[METRIC], state=state)


class Pruning(TrialScheduler):
    """A scheduler that asks the pruner of a `TpeHyperband`'s study."""

    def __init__(self, searcher: TpeHyperband):
        super().__init__()
        self._searcher = searcher

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take in a trial."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ask the study's pruner."""
        of_study = self._searcher.trials[trial.trial_id]
        of_study.report(result[METRIC], round(result["schedule_percent"]))
        if not of_study.should_prune():
            return str(TrialScheduler.CONTINUE)
        self._searcher.pruned.add(trial.trial_id)
        return str(TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Take in a trial's end."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Take in that a trial failed."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget a trial."""

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Choose none: the replay begins trials itself."""

    def debug_string(self) -> str:
        """Describe nothing."""
        return ""


def main() -> None:
    """Play, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--half", choices=("design", "judged"), default="judged")
    parser.add_argument("--together", type=int, default=16, help="trials on the GPU at once")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="file for a plot of regret over GPU-seconds")
    arguments = parser.parse_args()
    found = {}
    for name in arguments.only:
        one = partial(play_once, name, arguments.half, arguments.together)
        with ProcessPoolExecutor(arguments.processes) as pool:
            found[name] = list(pool.map(one, range(arguments.seeds), chunksize=8))
        print(f"{name}: {summary(found[name], best_of(arguments.half))}", file=sys.stderr, flush=True)
    best, (baseline, *_, ours) = best_of(arguments.half), found
    if arguments.picture:
        draw(found, best, arguments.picture)
    told = {name: summary(played, best) for name, played in found.items()}
    ratio, second = worst_ratio(found[ours], found[baseline], best)
    print_report(
        "search",
        told[ours]["median_seconds"],
        told[baseline]["median_seconds"],
        "GPU-seconds to within 1 %",
        {
            **{key: value for key, value in vars(arguments).items() if key != "picture"},
            "ours": ours,
            "found": told,
            "worst_ratio_of_p90_regrets": round(ratio, 3),
            "at_seconds": second,
        },
        higher_is_better=False,
    )


def play_once(name: str, half: str, together: int, seed: int) -> Played:
    """Play a contender with a seed, until it has the half's best."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune.search").setLevel(logging.ERROR)
    rows, costs = rows_of(half), _costs()
    who = CONTENDERS[name](seed, len(rows))
    enough = best_of(half) * (1 + 1e-9)
    return play(
        rows, costs, who.searcher, who.scheduler, who.rungs, together, _MOST_SECONDS, enough, who.may_begin
    )


@lru_cache
def rows_of(half: str) -> list[Row]:
    """Return the rows of a half, the first seed of each configuration.

    Two of every four: neighbours in a Sobol sequence lie in different halves of a range.
    """
    parity = 0 if half == "design" else 1
    return [row for row in read_table().rows if row.seed == 0 and row.number // 2 % 2 == parity]


@lru_cache
def best_of(half: str) -> float:
    """Return the best public perplexity of a half, wherever on a curve."""
    return min(point.public_perplexity for row in rows_of(half) for point in row.points)


@lru_cache
def _costs() -> Costs:
    return Costs.of(read_table())


def space() -> dict[str, Any]:
    """Return the ranges of the table as Ray Tune's param_space."""
    return tune_space(_own_space(seed=0))


def _asha() -> ASHAScheduler:
    return ASHAScheduler(**_ASHA.model_dump(exclude={"type"}))


@dataclass(frozen=True)
class Strategy:
    """Who searches, as `play` takes it. rungs: when trials are evaluated."""

    searcher: Searcher
    scheduler: TrialScheduler
    rungs: Asha | Rounds
    may_begin: Callable[[int], bool] = lambda number: True


def _random(seed: int, num_trials: int) -> Strategy:
    return Strategy(RandomSearch(space(), seed), _asha(), _ASHA)


def _optuna(seed: int, num_trials: int) -> Strategy:
    return Strategy(OptunaSearch(space(), metric=METRIC, mode="min", seed=seed), _asha(), _ASHA)


def _hyperband(seed: int, num_trials: int) -> Strategy:
    searcher = TpeHyperband(space(), seed)
    return Strategy(searcher, Pruning(searcher), _ASHA)


def _ours(seed: int, num_trials: int) -> Strategy:
    rounds = Rounds(type="rounds")
    scheduler = RoundScheduler(rounds, [], num_trials, num_devices=1)
    return Strategy(PriorSearcher(_own_space(seed), _WIDTH), scheduler, rounds, scheduler.may_begin)


def _random_rounds(seed: int, num_trials: int) -> Strategy:
    return replace(_ours(seed, num_trials), searcher=RandomSearch(space(), seed))


def _prior_asha(seed: int, num_trials: int) -> Strategy:
    return Strategy(PriorSearcher(_own_space(seed), _WIDTH), _asha(), _ASHA)


def _own_space(seed: int) -> Space:
    """Return the ranges of the table as a space file has them."""
    nowhere = {"train": "train.json", "public": "public.json"}
    search = {
        "learning_rate": {"loguniform": list(make.RATES)},
        "lora_r": {"choice": list(make.RANKS)},
        "lora_alpha": {"choice": list(make.ALPHAS)},
        "lora_dropout": {"uniform": [0, make.MOST_DROPOUT]},
        "schedule": {"choice": list(make.SCHEDULES)},
        "epochs": {"choice": list(make.EPOCHS)},
    }
    return Space.model_validate({"data": nowhere, "search": search, "seed": seed})


CONTENDERS: dict[str, Callable[[int, int], Strategy]] = {
    "random + ASHA": _random,
    "Optuna + ASHA": _optuna,
    "Optuna's TPE + Hyperband": _hyperband,
    "random + rounds": _random_rounds,
    "prior + ASHA": _prior_asha,
    "prior + rounds": _ours,
}


if __name__ == "__main__":
    main()
