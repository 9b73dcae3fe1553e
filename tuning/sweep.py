"""Owns a sweep: Ray Tune's Tuner around `run_trial`, new or restored, and the best adapter that it leaves.

ASHA, searchers and restore are Ray's. Two things that Ray leaves out are added over the ledger: after a
restore ASHA is told the rungs that trials had reached (tuning.restored_asha), and a state that lost its
trials is noticed (tuning.sweep_callback).
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from qlora.checkpoint import ADAPTER
from qlora.config import InputError
from tuning.ledger import Ledger, TrialRecord, ranked
from tuning.restored_asha import RestoredASHA
from tuning.space import Asha, Space, tune_space
from tuning.sweep_callback import SweepCallback, SweepObserver
from tuning.trial import run_trial


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
    """Run or continue the sweep whose results live in `folder`; returns the record of every trial.

    `shares`: what a trial asks Ray for. Trials still pending or running in the result mean that it was
    interrupted and can be resumed. Raises InputError if Ray's saved state has lost trials that the ledger
    knows.
    """
    experiment = storage_path(space, folder) + "/ray"
    trainable = tune.with_resources(tune.with_parameters(run_trial, hosts=hosts), shares)
    callback, scheduler = SweepCallback(folder, space, zero_shot, observer), _scheduler(space, folder)
    if resume and tune.Tuner.can_restore(experiment):
        tuner = _restored_tuner(experiment, trainable, callback, scheduler)
    else:
        tuner = _new_tuner(space, experiment, trainable, callback, scheduler)
    try:
        tuner.fit()
    finally:
        callback.give_screen_back()
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
    records = ranked(list(Ledger(folder / "trials").records.values()))
    best = next((record for record in records if record.best), None)
    if best is None:
        raise InputError(
            folder, "no trial reached an evaluation; see the errors above and trials/ in this folder"
        )
    experiment = storage_path(space, folder) + "/ray"
    analysis = tune.ExperimentAnalysis(experiment, default_metric="public_perplexity", default_mode="min")
    found = {}
    for trial in analysis.trials:
        if trial.checkpoint is not None:
            checkpoint = analysis.get_best_checkpoint(trial, metric="public_perplexity", mode="min")
            if checkpoint is not None:
                found[trial.trial_id] = checkpoint
    target = folder / "best"
    with found[best.trial_id].as_directory() as source:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(Path(source) / ADAPTER, target)
    return BestAdapter(best, target, {trial_id: checkpoint.path for trial_id, checkpoint in found.items()})


def storage_path(space: Space, folder: Path) -> str:
    """Return where Ray keeps checkpoints: `storage` of the space, which all nodes reach, else the folder."""
    return f"{space.storage.rstrip('/')}/{folder.name}" if space.storage else str(folder.resolve())


def _new_tuner(
    space: Space,
    experiment: str,
    trainable: Callable[..., Any],
    callback: SweepCallback,
    scheduler: TrialScheduler,
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
            scheduler=scheduler,
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


def _restored_tuner(
    experiment: str, trainable: Callable[..., Any], callback: SweepCallback, scheduler: TrialScheduler
) -> tune.Tuner:
    """Restore a sweep, with this session's callback and scheduler in place of those that Ray stored."""
    tuner = tune.Tuner.restore(experiment, trainable, resume_unfinished=True, restart_errored=False)
    stored: Any = tuner._local_tuner  # Tuner.restore takes neither
    stored.get_run_config().callbacks = [callback]
    stored._tune_config.scheduler = scheduler
    return tuner


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
