"""Make the search table: many configurations, each trained whole on one GPU, several at once.

    python benchmarks/search_table/make.py --train train.json --public public.json --parts FOLDER \\
        [--minutes 9] [--share 0 2]
    python benchmarks/search_table/make.py --parts FOLDER --pack
    python benchmarks/search_table/make.py --parts FOLDER --unpack

The first command trains what FOLDER lacks, at most for so many minutes, and can be given again and again; the
second writes the table of what is there, and the third puts there what the table has. Configurations are a
quasi-random draw over the ranges of search_spaces/wide.yaml, with stages of one epoch; some are trained with
three seeds. Rows are split as the table's card says: the first for training, the last of the training file
for nothing but a figure at the end.

Each trial's curve is that of a sweep (tuning.shared_work): trials share passes, and depend on themselves
alone. Where its learning rate has come down to nothing, at the end of a stage, a trial is a result, and the
perplexity of each public and each unseen example is kept.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from benchmarks.search_table.table import CARD_FACTS, TABLE, unpack_table, write_table
from qlora.base.model import load_tokenizer
from qlora.config import DEFAULT_BASE, BaseModelSettings, TrialSettings
from qlora.data.examples import load_examples
from qlora.data.prompts import EncodedExample, encode_examples, load_prompt
from qlora.provenance import hardware, package_versions
from qlora.training import DivergedError, Training, make_timetable
from tuning.shared_work import SharedWork, TrialWork

CONFIGURATIONS, REPEATED, SEEDS = 256, 32, (0, 1, 2)
NUM_TRAIN, NUM_UNSEEN = 3000, 500
EARLY = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)  # epochs
LATER = 1 / 2  # epochs between points behind the first
RANKS = ALPHAS = (8, 16, 32, 64, 128)
SCHEDULES = ("linear", "cosine")
EPOCHS: tuple[int | str, ...] = (1, 2, 3, "1+1", "1+1+1")
RATES = (1e-5, 5e-3)
MOST_DROPOUT = 0.2
_DRAWN_AHEAD = 6  # fresh adapters, which a thread draws while others train


def main() -> None:
    """Train what is missing, or pack what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", help="a JSON list of id, instruction, output")
    parser.add_argument("--public", help="another, on which perplexity is measured along the way")
    parser.add_argument("--base-model", default=DEFAULT_BASE)
    parser.add_argument("--parts", type=Path, required=True, help="folder of what is done so far")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no more is begun")
    parser.add_argument("--together", type=int, default=12, help="trials at once")
    parser.add_argument(
        "--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="of N processes"
    )
    parser.add_argument("--budget-tokens", type=int, help="of a pass; the device's default if left out")
    parser.add_argument("--configurations", type=int, default=CONFIGURATIONS)
    parser.add_argument("--pack", action="store_true", help=f"write {TABLE.name} of what is there")
    parser.add_argument("--unpack", action="store_true", help=f"bring what {TABLE.name} has to the folder")
    arguments = parser.parse_args()
    if arguments.unpack:
        unpack_table(TABLE, arguments.parts)
        return
    if arguments.pack:
        print(write_table(arguments.parts, TABLE))
        return
    arguments.parts.mkdir(parents=True, exist_ok=True)
    missing = [
        (number, seed)
        for number, seed in _wanted(arguments.configurations)
        if not _place(arguments.parts, number, seed).exists()
    ]
    print(f"{len(missing)} trials are missing", flush=True)
    first, step = arguments.share
    if missing[first::step]:
        _Maker(arguments).make(missing[first::step])


def configurations(count: int) -> list[dict[str, Any]]:
    """Draw configurations: a scrambled Sobol sequence over the ranges, always the same."""
    points = torch.quasirandom.SobolEngine(6, scramble=True, seed=0).draw(count).tolist()
    low, high = (math.log(rate) for rate in RATES)
    return [
        {
            "learning_rate": float(f"{math.exp(low + (high - low) * point[0]):.4g}"),
            "lora_r": _pick(RANKS, point[1]),
            "lora_alpha": _pick(ALPHAS, point[2]),
            "lora_dropout": round(MOST_DROPOUT * point[3], 4),
            "schedule": _pick(SCHEDULES, point[4]),
            "epochs": _pick(EPOCHS, point[5]),
        }
        for point in points
    ]


def _pick(choices: Sequence[Any], share: float) -> Any:
    return choices[min(int(share * len(choices)), len(choices) - 1)]


def _wanted(count: int) -> Iterator[tuple[int, int]]:
    """Yield (configuration's number, seed) of each trial; the first ones have more seeds than one."""
    yield from ((number, SEEDS[0]) for number in range(count))
    yield from ((number, seed) for number in range(min(count, REPEATED)) for seed in SEEDS[1:])


def _place(parts: Path, number: int, seed: int) -> Path:
    return parts / f"trial-{number:03d}-{seed}.json"


@dataclass
class _Trial:
    """A configuration in training, with what it has come to so far.

    seconds: of passes, by its share of their tokens. points: see the table's card. ends: of stages.
    """

    number: int
    seed: int
    config: dict[str, Any]
    work: TrialWork
    stops: list[int]
    stage_ends: set[int]
    points: list[list[float]] = field(default_factory=list)
    ends: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def is_at_stop(self) -> bool:
        """Tell whether it is to be evaluated."""
        return self.work.training.step == self.stops[0]


class _Maker:
    """The base with its trials, and what steps of so many trials cost."""

    def __init__(self, arguments: argparse.Namespace):
        self._began, self._arguments = time.monotonic(), arguments
        tokenizer, prompt = load_tokenizer(arguments.base_model), load_prompt()

        def encoded(place: str, rows: slice) -> list[EncodedExample]:
            found = load_examples(place, need_output=True)
            return encode_examples(tokenizer, prompt, found[rows], place)

        self._train = encoded(arguments.train, slice(NUM_TRAIN))
        self._unseen = encoded(arguments.train, slice(-NUM_UNSEEN, None))
        self._public = encoded(arguments.public, slice(None))
        self._shared = SharedWork(BaseModelSettings(name=arguments.base_model), arguments.budget_tokens)
        self._trials: list[_Trial] = []
        self._costs: list[list[float]] = []
        self._ready = 0.0

    def make(self, missing: list[tuple[int, int]]) -> None:
        """Train trials, each written as it is done, until there is no more or time is over."""
        drawn = configurations(self._arguments.configurations)
        queue = list(reversed(missing))
        ahead: list[tuple[int, int, TrialSettings, Future[torch.Tensor]]] = []
        zero_shot = self._mean_of(None, self._public), self._mean_of(None, self._unseen)
        self._ready = self._elapsed()
        with ThreadPoolExecutor(2) as threads:
            while self._next(queue, drawn) is not None or ahead or self._trials:
                if self._elapsed() > 60 * self._arguments.minutes:
                    break
                while len(ahead) < _DRAWN_AHEAD and (place := self._next(queue, drawn)) is not None:
                    number, seed = queue.pop(place)
                    settings = TrialSettings(seed=seed, **drawn[number])
                    ahead.append(
                        (number, seed, settings, threads.submit(self._shared.bank.fresh_weights, settings))
                    )
                while ahead and len(self._trials) < self._arguments.together:
                    number, seed, settings, weights = ahead.pop(0)
                    self._trials.append(self._begin(number, seed, drawn[number], settings, weights.result()))
                self._turn()
        facts = {
            "hardware": hardware("cuda" if torch.cuda.is_available() else "cpu"),
            "versions": package_versions(),
            "together": self._arguments.together,
            "share": self._arguments.share,
            "zero_shot": zero_shot,
            "num_train": len(self._train),
            "num_public": len(self._public),
            "num_unseen": len(self._unseen),
            "seconds": self._elapsed(),
            "notes": self._shared.notes,
            "costs": self._costs,
        }
        name = f"{CARD_FACTS}-{int(time.time())}-{self._arguments.share[0]}.json"
        (self._arguments.parts / name).write_text(json.dumps(facts), encoding="utf-8")

    def _next(self, queue: list[tuple[int, int]], drawn: Sequence[dict[str, Any]]) -> int | None:
        """Return the place, from the end of the queue on, of a trial that ends in time; None if none does."""
        left = 60 * self._arguments.minutes - self._elapsed()
        per_step = (self._elapsed() - self._ready) / max(1, len(self._costs))
        for place in reversed(range(len(queue))):
            settings = TrialSettings(**drawn[queue[place][0]])
            if per_step * make_timetable(len(self._train), settings).total_steps < left:
                return place
        return None

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _begin(
        self, number: int, seed: int, config: dict[str, Any], settings: TrialSettings, weights: torch.Tensor
    ) -> _Trial:
        timetable = make_timetable(len(self._train), settings)
        per_epoch, epochs = timetable.steps_per_epoch, sum(settings.stages)
        places = [*EARLY, *(1 + LATER * part for part in range(1, round((epochs - 1) / LATER) + 1))]
        stops = sorted({math.ceil(place * per_epoch) for place in places})
        ends, end = set[int](), 0
        for stage in settings.stages:
            end += stage * per_epoch
            ends.add(end)
        work = TrialWork(Training(self._shared.bank, self._train, settings, weights))
        return _Trial(number, seed, config, work, stops, ends)

    def _turn(self) -> None:
        """Evaluate those that have come to a point; or take a step of all."""
        if there := [trial for trial in self._trials if trial.is_at_stop]:
            self._evaluate(there)
        else:
            self._step()
        for trial in [trial for trial in self._trials if trial.error or not trial.stops]:
            self._end(trial)

    def _step(self) -> None:
        began = time.monotonic()
        errors = self._shared.train([trial.work for trial in self._trials])
        seconds = time.monotonic() - began
        took = [
            trial.work.seen[-1].num_tokens if error is None else 0
            for trial, error in zip(self._trials, errors, strict=True)
        ]
        total = max(1, sum(took))
        for trial, tokens, error in zip(self._trials, took, errors, strict=True):
            trial.tokens += tokens
            trial.seconds += seconds * tokens / total
            if error is not None:
                assert isinstance(error, DivergedError), error
                trial.error = str(error)
        ranks = sum(trial.config["lora_r"] * tokens for trial, tokens in zip(self._trials, took, strict=True))
        self._costs.append([len(self._trials), total, ranks, round(seconds, 5)])

    def _evaluate(self, trials: Sequence[_Trial]) -> None:
        began = time.monotonic()
        adapters = [trial.work.training.adapter for trial in trials]
        found = self._shared.evaluate([(adapter, self._public) for adapter in adapters])
        seconds = (time.monotonic() - began) / len(trials)
        ended = [trial for trial in trials if trial.stops[0] in trial.stage_ends]
        of_unseen = self._shared.evaluate([(one.work.training.adapter, self._unseen) for one in ended])
        unseen = {id(trial): values for trial, values in zip(ended, of_unseen, strict=True)}
        for trial, values in zip(trials, found, strict=True):
            assert not isinstance(values, Exception), values
            step = trial.stops.pop(0)
            seen = trial.work.seen
            loss = sum(one.loss for one in seen) / len(seen)
            trial.points.append([step, loss, sum(values) / len(values), trial.seconds, seconds])
            trial.work.forget()
            if id(trial) in unseen:
                trial.ends.append({"step": step, "public": values, "unseen": unseen[id(trial)]})
            if not math.isfinite(trial.points[-1][2]):
                trial.error = f"diverged at step {step}: public perplexity is not finite"

    def _end(self, trial: _Trial) -> None:
        self._trials.remove(trial)
        self._shared.bank.detach(trial.work.training.adapter)
        record = {
            "number": trial.number,
            "seed": trial.seed,
            "config": trial.config,
            "points": trial.points,
            "ends": trial.ends,
            "tokens": trial.tokens,
            "error": trial.error,
            "share": self._arguments.share,
        }
        place = _place(self._arguments.parts, trial.number, trial.seed)
        place.write_text(json.dumps(record), encoding="utf-8")
        last = f"{trial.points[-1][2]:.3f}" if trial.points else "none"
        print(
            f"{self._elapsed():.0f} s: {trial.number}/{trial.seed} {last} {trial.error} {trial.config}",
            flush=True,
        )

    def _mean_of(self, adapter: None, examples: Sequence[EncodedExample]) -> float:
        (values,) = self._shared.evaluate([(adapter, examples)])
        assert not isinstance(values, Exception), values
        return sum(values) / len(values)


if __name__ == "__main__":
    main()
