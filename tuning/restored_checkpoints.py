"""Owns the checkpoints that Ray's stored state names, after a restore.

Ray deletes a checkpoint before it writes down that there is a newer one, so that a driver that was killed in
between comes back with a trial whose checkpoint is gone, and Ray fails such a trial. Here the trial goes on
from the newest whole checkpoint in its folder, or from its beginning if there is none.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs

from tuning.ledger import TrialRecord


def mend_checkpoints(trial: Any, record: TrialRecord | None) -> None:
    """Let a trial of Ray's know only checkpoints that exist.

    record: what the ledger knows of it, where a checkpoint's perplexity is found by its step.
    """
    manager = trial.run_metadata.checkpoint_manager
    manager._checkpoint_results = [
        found for found in manager._checkpoint_results if _is_there(found.checkpoint)
    ]
    latest = manager.latest_checkpoint_result
    if latest is None or _is_there(latest.checkpoint):
        return
    manager._latest_checkpoint_result = None
    for index, step, checkpoint in _whole_checkpoints(trial):
        perplexities = {point["step"]: point["public_perplexity"] for point in record.curve} if record else {}
        if step in perplexities:
            metrics = {**latest.metrics, "step": step, "public_perplexity": perplexities[step]}
            manager.register_checkpoint(type(latest)(checkpoint=checkpoint, metrics=metrics))
            trial.storage.current_checkpoint_index = index  # the next one comes after it
            return


def _is_there(checkpoint: Any) -> bool:
    return checkpoint.filesystem.get_file_info(checkpoint.path).type != pyarrow.fs.FileType.NotFound


def _whole_checkpoints(trial: Any) -> Iterator[tuple[int, int, Any]]:
    """Yield index, step and checkpoint of each whole one in a trial's folder here, newest first."""
    from ray import tune

    from qlora.checkpoint import POSITION, CheckpointError, verify_checkpoint

    for folder in sorted(Path(trial.storage.trial_fs_path).glob("checkpoint_*"), reverse=True):
        try:
            verify_checkpoint(folder)
        except CheckpointError:
            continue
        step = json.loads((folder / POSITION).read_text(encoding="utf-8"))["step"]
        yield int(folder.name.rpartition("_")[2]), step, tune.Checkpoint.from_directory(folder)
