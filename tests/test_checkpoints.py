"""Which checkpoints of a trial are kept, in Ray's own books, and what tells that a large one is whole."""

import hashlib
import json
from types import SimpleNamespace

import pytest
from ray import tune
from ray.train import CheckpointConfig
from ray.train._internal.checkpoint_manager import _CheckpointManager
from ray.train._internal.session import _TrainingResult

from qlora import checkpoint_files
from qlora.checkpoint_files import (
    MANIFEST,
    OPTIMIZER,
    POSITION,
    CheckpointError,
    verify_checkpoint,
    write_manifest,
)
from tuning.checkpoints import Storage, keep_two


@pytest.fixture
def trial():
    manager = _CheckpointManager(checkpoint_config=CheckpointConfig(num_to_keep=None))
    return SimpleNamespace(run_metadata=SimpleNamespace(checkpoint_manager=manager))


def report(trial, storage, index, step, perplexity):
    """Do what Ray does with a trial's report: the callback first, then its books."""
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


PIECE = 1 << 16


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A checkpoint whose optimizer's file has two pieces and a half, no two of them alike."""
    assert checkpoint_files._PIECE_BYTES == 64 << 20, "as digests say"
    monkeypatch.setattr(checkpoint_files, "_PIECE_BYTES", PIECE)
    with open(tmp_path / OPTIMIZER, "wb") as file:
        for index, size in enumerate((PIECE, PIECE, PIECE // 2)):
            file.write(bytes([index]) * size)
    (tmp_path / POSITION).write_text(json.dumps({"step": 1}))
    write_manifest(tmp_path)
    return tmp_path


def test_a_large_file_is_told_by_its_pieces(large):
    verify_checkpoint(large)
    pieces = b"".join(
        hashlib.sha256(bytes([index]) * size).digest()
        for index, size in enumerate((PIECE, PIECE, PIECE // 2))
    )
    digest = json.loads((large / MANIFEST).read_text())[OPTIMIZER]
    assert digest.endswith(hashlib.sha256(pieces).hexdigest())


@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, 2 * PIECE + 7])
def test_one_byte_of_a_large_file_is_enough(large, place):
    with open(large / OPTIMIZER, "r+b") as file:
        file.seek(place)
        file.write(b"!")
    with pytest.raises(CheckpointError, match=OPTIMIZER):
        verify_checkpoint(large)


@pytest.mark.parametrize("size", [0, PIECE, 2 * PIECE, 2 * PIECE + PIECE // 2 - 1, 3 * PIECE])
def test_a_large_file_that_was_cut_or_has_grown(large, size):
    with open(large / OPTIMIZER, "r+b") as file:
        file.truncate(size)
    with pytest.raises(CheckpointError, match=OPTIMIZER):
        verify_checkpoint(large)


def test_pieces_that_changed_places(large):
    content = (large / OPTIMIZER).read_bytes()
    (large / OPTIMIZER).write_bytes(content[PIECE : 2 * PIECE] + content[:PIECE] + content[2 * PIECE :])
    with pytest.raises(CheckpointError, match=OPTIMIZER):
        verify_checkpoint(large)


def test_a_checkpoint_with_the_digest_of_a_large_file_as_a_whole(large):
    """It is good, and tells damage: sweeps that began before there were pieces have such ones."""
    manifest = json.loads((large / MANIFEST).read_text())
    manifest[OPTIMIZER] = hashlib.sha256((large / OPTIMIZER).read_bytes()).hexdigest()
    (large / MANIFEST).write_text(json.dumps(manifest))
    verify_checkpoint(large)
    with open(large / OPTIMIZER, "ab") as file:
        file.write(b"!")
    with pytest.raises(CheckpointError, match=OPTIMIZER):
        verify_checkpoint(large)


def test_a_digest_that_is_no_text(large):
    manifest = json.loads((large / MANIFEST).read_text())
    (large / MANIFEST).write_text(json.dumps({**manifest, OPTIMIZER: 3}))
    with pytest.raises(CheckpointError, match=OPTIMIZER):
        verify_checkpoint(large)
