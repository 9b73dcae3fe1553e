"""Which checkpoints of a trial are kept, in Ray's own books."""

import json
from types import SimpleNamespace

import pytest
from ray import tune
from ray.train import CheckpointConfig
from ray.train._internal.checkpoint_manager import _CheckpointManager
from ray.train._internal.session import _TrainingResult

from qlora.checkpoint_files import OPTIMIZER, POSITION, write_manifest
from tuning.checkpoints import Storage, keep_two


@pytest.fixture
def trial():
    manager = _CheckpointManager(checkpoint_config=CheckpointConfig(num_to_keep=None))
    return SimpleNamespace(run_metadata=SimpleNamespace(checkpoint_manager=manager))


def report(trial, storage, index, step, perplexity):
    """What Ray does with a trial's report: the callback first, then its books."""
    folder = storage / "trial" / f"checkpoint_{index:06d}"
    folder.mkdir(parents=True)
    (folder / OPTIMIZER).write_bytes(b"")
    (folder / POSITION).write_text(json.dumps({"step": step}))
    write_manifest(folder)
    keep_two(trial)
    metrics = {"step": step, "public_perplexity": perplexity}
    result = _TrainingResult(checkpoint=tune.Checkpoint(folder), metrics=metrics)
    trial.run_metadata.checkpoint_manager.register_checkpoint(result)
    return folder


def test_the_newest_is_kept_and_the_best_before(trial, tmp_path):
    for index, perplexity in enumerate([9.0, 5.0, 7.0, 8.0]):
        report(trial, tmp_path, index, index + 1, perplexity)
    assert [one.step for one in Storage.at(str(tmp_path)).checkpoints("trial")] == [2, 4]


@pytest.mark.parametrize("again", [5.0, 5.001, 4.999])
def test_a_step_that_is_done_again_takes_the_place_of_its_damaged_checkpoint(trial, tmp_path, again):
    storage = Storage.at(str(tmp_path))
    report(trial, tmp_path, 0, 1, 9.0)
    storage.remove(str(report(trial, tmp_path, 1, 2, 5.0)))  # as a trial does that passes over it
    for index, (step, perplexity) in enumerate([(2, again), (3, 7.0), (4, 8.0)], start=2):
        report(trial, tmp_path, index, step, perplexity)
    assert [one.step for one in storage.checkpoints("trial")] == [2, 4]
