"""Owns a sweep: Ray Tune's Tuner around `run_trial`, its progress on the screen, its ledger, its restore.

ASHA, searchers and restore are Ray's. Two things Ray leaves out are added by composition over the ledger: after a restore
ASHA is told the rungs that trials had reached, and a state that lost its trials is noticed.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from qlora.checkpoint import ADAPTER
from qlora.config import InputError
from tuning.ledger import Ledger, TrialRecord, ranked
from tuning.progress import headline, table
from tuning.space import Asha, Space, tune_space
from tuning.trial import run_trial

_POINT = (
    "step",
    "epoch",
    "schedule_percent",
    "public_perplexity",
    "training_loss",
    "learning_rate",
    "tokens_per_second",
    "peak_memory_gib",
)
_SECONDS_BETWEEN_TABLES = 20.0


class SweepObserver(Protocol):
    """Who wants to know what trials do, the tracking server for one. Must be picklable: Ray stores it with the sweep."""

    def trial_changed(self, record: TrialRecord) -> None:
        """A trial started, reported a point (the last of its curve) or ended."""


@dataclass
class SweepCallback(tune.Callback):
    """Ray Tune's events -> ledger, observer and screen."""

    folder: Path
    space: Space
    zero_shot: float
    observer: SweepObserver
    started_at: float = 0.0
    printed_at: float = 0.0

    def setup(
        self,
        stop: Any = None,
        num_samples: int | None = None,
        total_num_samples: int | None = None,
        **info: Any,
    ) -> None:
        self.ledger = Ledger(self.folder / "trials")
        self.started_at = self.printed_at = time.time()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if trials and set(self.ledger.records) - {trial.trial_id for trial in trials}:
            raise InputError(
                self.folder / "ray",
                "its state is damaged and lost trials that had run; start a new sweep under another --name",
            )

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        known = self.ledger.records.get(trial.trial_id)
        record = known or TrialRecord(
            trial.trial_id, _full_config(self.space, trial.config), started_at=time.time()
        )
        self._put(replace(record, status="running", ended_at=None))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "public_perplexity" in result:
            point = {key: float(result[key]) for key in _POINT}
            self._put(self.ledger.records[trial.trial_id].with_point(point, result["perplexities"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self.ledger.records[trial.trial_id]
        self._put(
            replace(record, status="finished" if record.percent >= 100 else "stopped", ended_at=time.time())
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self.ledger.records.get(trial.trial_id) or TrialRecord(
            trial.trial_id, _full_config(self.space, trial.config)
        )
        self._put(replace(record, status="failed", error=_last_line(trial.get_error()), ended_at=time.time()))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.time() - self.printed_at > _SECONDS_BETWEEN_TABLES:
            self._print()

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self._print()

    def _put(self, record: TrialRecord) -> None:
        self.ledger.put(record)
        self.observer.trial_changed(record)

    def _print(self) -> None:
        self.printed_at = time.time()
        records = list(self.ledger.records.values())
        print(
            f"\n{table(records, self.zero_shot)}\n{headline(records, self.space.num_trials, time.time() - self.started_at)}",
            flush=True,
        )


class RestoredASHA(ASHAScheduler):
    """Ray's ASHA, told of the rungs that a trial reached before a restore (its own state is not saved by Ray)."""

    def __init__(self, ledger_folder: Path, **options: Any):
        super().__init__(**options)
        self._ledger_folder = ledger_folder

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """As Ray's, then replay the trial's recorded curve into its bracket."""
        super().on_trial_add(tune_controller, trial)
        record = Ledger(self._ledger_folder).records.get(trial.trial_id)
        for point in record.curve if record else ():
            if point[self._time_attr] < self._max_t:
                self._trial_info[trial.trial_id].on_result(
                    trial, point[self._time_attr], -point["public_perplexity"]
                )


def run_sweep(
    space: Space,
    hosts: Any,
    shares: dict[str, float],
    folder: Path,
    zero_shot: float,
    observer: SweepObserver,
    *,
    resume: bool,
) -> list[TrialRecord]:
    """Run or continue the sweep whose results live in `folder`; returns its records, whatever became of each trial. `shares`: what a
    trial asks Ray for.

    Trials still pending or running in the result mean that it was interrupted and can be resumed. Raises InputError if
    Ray's saved state has lost trials that the ledger knows.
    """
    experiment = storage_path(space, folder) + "/ray"
    trainable = tune.with_resources(tune.with_parameters(run_trial, hosts=hosts), shares)
    if resume and tune.Tuner.can_restore(experiment):
        tuner = tune.Tuner.restore(experiment, trainable, resume_unfinished=True, restart_errored=False)
    else:
        tuner = _new_tuner(
            space, folder, experiment, trainable, SweepCallback(folder, space, zero_shot, observer)
        )
    tuner.fit()
    return list(Ledger(folder / "trials").records.values())


@dataclass(frozen=True)
class BestAdapter:
    """The best trial, the PEFT folder with its best adapter, and where every trial's best checkpoint is."""

    record: TrialRecord
    folder: Path
    checkpoints: dict[str, str]


def keep_best_adapter(space: Space, folder: Path) -> BestAdapter:
    """Copy the adapter of the best checkpoint of all trials to `folder`/best.

    Raises InputError if no trial has reported a perplexity.
    """
    experiment = storage_path(space, folder) + "/ray"
    best = next(
        (record for record in ranked(list(Ledger(folder / "trials").records.values())) if record.best), None
    )
    if best is None:
        raise InputError(
            folder, "no trial reached an evaluation; see the errors above and trials/ in this folder"
        )
    grid = tune.ExperimentAnalysis(experiment, default_metric="public_perplexity", default_mode="min")
    seen = [trial for trial in grid.trials if trial.checkpoint is not None]
    found = {
        trial.trial_id: checkpoint
        for trial in seen
        if (checkpoint := grid.get_best_checkpoint(trial, metric="public_perplexity", mode="min")) is not None
    }
    target = folder / "best"
    with found[best.trial_id].as_directory() as source:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(Path(source) / ADAPTER, target)
    return BestAdapter(best, target, {trial: checkpoint.path for trial, checkpoint in found.items()})


def storage_path(space: Space, folder: Path) -> str:
    """Where Ray keeps checkpoints: `storage` of the space (a disk or object store that all nodes reach), else the folder."""
    return f"{space.storage.rstrip('/')}/{folder.name}" if space.storage else str(folder.resolve())


def _new_tuner(
    space: Space, folder: Path, experiment: str, trainable: Callable[..., Any], callback: SweepCallback
) -> tune.Tuner:
    storage, _, name = experiment.rpartition("/")
    return tune.Tuner(
        trainable,
        param_space=tune_space(space),
        tune_config=tune.TuneConfig(
            metric="public_perplexity",
            mode="min",
            num_samples=space.num_samples,
            search_alg=_searcher(space),
            scheduler=_scheduler(space, folder),
            reuse_actors=True,
            max_concurrent_trials=space.max_concurrent_trials,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=storage,
            callbacks=[callback],
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=space.max_failures),
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="public_perplexity", checkpoint_score_order="min"
            ),
        ),
    )


def _scheduler(space: Space, folder: Path) -> TrialScheduler:
    settings = space.scheduler
    if not isinstance(settings, Asha):
        return FIFOScheduler()
    return RestoredASHA(
        folder / "trials",
        time_attr=settings.time_attr,
        max_t=settings.max_t,
        grace_period=settings.grace_period,
        reduction_factor=settings.reduction_factor,
    )


def _searcher(space: Space) -> Searcher | SearchAlgorithm:
    if space.searcher.type == "random":
        return BasicVariantGenerator(random_state=space.seed)
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(seed=space.seed)


def _full_config(space: Space, config: dict[str, Any]) -> dict[str, Any]:
    return space.trial_settings(config).model_dump(mode="json")


def _last_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines() if error else []
    return lines[-1] if lines else "unknown error; see Ray's log"
