"""Owns a sweep's checkpoints in Ray's storage: which are there, which are kept, which is the best.

    STORAGE/TRIAL/checkpoint_000003/    one evaluation's; the newest is kept, and the best of those before
    STORAGE/TRIAL/checkpoint_stopped/   where a trial stood when its sweep was stopped, if not at a report

What a folder holds is believed, not what Ray's own state says of it: Ray deletes a checkpoint before it
writes down that there is a newer one, and its state can't be read without running what is in it. The storage
may be a folder or an object store. Loads nothing heavy.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs

from qlora.checkpoint_files import MANIFEST, POSITION, CheckpointError, read_position, verify_checkpoint
from qlora.failpoints import durable
from tuning.ledger import TrialRecord
from tuning.objective import METRIC, PERPLEXITY, standing

RAY = "ray"  # the name of what Ray keeps, below a storage path
STOPPED = "checkpoint_stopped"
_PREFIX = "checkpoint_"


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint of a trial after so many optimizer steps. index: the number in its name, -1 for none."""

    index: int
    step: int
    path: str


@dataclass(frozen=True)
class Storage:
    """The place where Ray keeps a sweep's checkpoints: a path of a file system of pyarrow's."""

    filesystem: Any
    path: str

    @classmethod
    def at(cls, uri: str) -> "Storage":
        """Find the storage of a URI or of a local path."""
        from ray.train._internal.storage import get_fs_and_path  # reads credentials as Ray itself does

        filesystem, path = get_fs_and_path(uri)
        return cls(filesystem, path)

    def trial_folders(self) -> dict[str, str]:
        """Return the path of each trial's folder by its name."""
        return {info.base_name: info.path for info in self._infos(self.path)}

    def folder_of(self, trial_id: str) -> str:
        """Return the name of a trial's folder: its id, or, before ids were names, a longer name around it."""
        names = self.trial_folders()
        longer = (name for name in names if f"_{trial_id}_" in name)
        return trial_id if trial_id in names else next(longer, trial_id)

    def checkpoints(self, folder: str) -> list[StoredCheckpoint]:
        """List the checkpoints in a trial's folder that were finished, by ascending step."""
        found = []
        for info in self._infos(f"{self.path}/{folder}"):
            name = info.base_name
            if name.startswith(_PREFIX) and (step := self._step(info.path)) is not None:
                number = name.removeprefix(_PREFIX)
                found.append(StoredCheckpoint(int(number) if number.isdigit() else -1, step, info.path))
        return sorted(found, key=lambda one: (one.step, one.index))

    def last_index(self, folder: str) -> int:
        """Return the highest number that a checkpoint's name in a trial's folder has, -1 for none."""
        names = [info.base_name.removeprefix(_PREFIX) for info in self._infos(f"{self.path}/{folder}")]
        return max((int(name) for name in names if name.isdigit()), default=-1)

    def is_finished(self, path: str) -> bool:
        """Tell whether there is a checkpoint that was finished."""
        return self._step(path) is not None

    def remove(self, path: str) -> None:
        """Remove a checkpoint, if it is there."""
        with durable("checkpoint removed"), suppress(FileNotFoundError):
            self.filesystem.delete_dir(path)

    @contextmanager
    def here(self, path: str) -> Iterator[Path]:
        """Provide a checkpoint as a folder of this machine, within."""
        if isinstance(self.filesystem, pyarrow.fs.LocalFileSystem):
            yield Path(path)
            return
        with tempfile.TemporaryDirectory() as folder:
            pyarrow.fs.copy_files(path, folder, source_filesystem=self.filesystem)
            yield Path(folder)

    def put(self, folder: Path, name: str) -> None:
        """Replace what is under a name, such as TRIAL/checkpoint_stopped, with a folder of this machine."""
        path = f"{self.path}/{name}"
        if self.filesystem.get_file_info(path).type != pyarrow.fs.FileType.NotFound:
            self.remove(path)
        self.filesystem.create_dir(path)
        with durable("stopped checkpoint"):
            pyarrow.fs.copy_files(str(folder), path, destination_filesystem=self.filesystem)

    def _step(self, path: str) -> int | None:
        """Return the step of a checkpoint; None if it was not finished or can't be read."""
        try:
            with self.filesystem.open_input_stream(f"{path}/{MANIFEST}") as file:
                file.read(1)
            with self.filesystem.open_input_stream(f"{path}/{POSITION}") as file:
                return int(read_position(file.read())["step"])
        except (OSError, ValueError):
            return None

    def _infos(self, path: str) -> list[Any]:
        selector = pyarrow.fs.FileSelector(path, allow_not_found=True)
        return [info for info in self.filesystem.get_file_info(selector) if info.type.name == "Directory"]


def put_start(storage: Storage, source_id: str, trial_id: str) -> None:
    """Let a trial begin with the adapter that another one has in its newest whole checkpoint.

    Raises CheckpointError if there is none.
    """
    from qlora.checkpoint import start_from

    for stored in reversed(storage.checkpoints(storage.folder_of(source_id))):
        with suppress(CheckpointError, OSError), tempfile.TemporaryDirectory() as name:
            target = Path(name) / "start"
            with storage.here(stored.path) as folder:
                start_from(folder, target)
            storage.put(target, f"{trial_id}/{STOPPED}")
            return
    raise CheckpointError(f"trial {source_id} has no checkpoint to go on from")


def restore_checkpoints(trial: Any, storage: Storage, record: TrialRecord) -> None:
    """Tell Ray's books of a trial what is in its folder, so that it goes on from the newest."""
    from ray import tune
    from ray.train._internal.session import _TrainingResult

    folder = storage.folder_of(trial.trial_id)
    trial.custom_dirname = folder
    trial.storage.current_checkpoint_index = storage.last_index(folder)  # the next one comes after it
    ranks = {point["step"]: standing(point) for point in record.curve}
    manager, newest = trial.run_metadata.checkpoint_manager, -1
    for stored in storage.checkpoints(folder):
        if stored.index < 0 and stored.step <= newest:
            storage.remove(stored.path)  # the trial has been further since
            continue
        if stored.index >= 0 and stored.step not in ranks:
            storage.remove(stored.path)  # its point was not recorded: it is reported again
            continue
        newest = max(newest, stored.step)
        score, perplexity = ranks.get(stored.step, (float("inf"), float("inf")))
        metrics = {"step": stored.step, METRIC: score, PERPLEXITY: perplexity}
        checkpoint = tune.Checkpoint(stored.path, storage.filesystem)
        manager.register_checkpoint(_TrainingResult(checkpoint=checkpoint, metrics=metrics))


def go_on_from_stopped(trial: Any, storage: Storage) -> None:
    """Tell Ray's books of a trial that it goes on from where it stood between two reports."""
    from ray import tune
    from ray.train._internal.session import _TrainingResult

    path = f"{storage.path}/{storage.folder_of(trial.trial_id)}/{STOPPED}"
    manager = trial.run_metadata.checkpoint_manager
    known = [found for found in manager._checkpoint_results if found.checkpoint.path != path]
    manager._checkpoint_results = known  # it has the same name each time
    metrics = {METRIC: float("inf"), PERPLEXITY: float("inf")}
    manager.register_checkpoint(
        _TrainingResult(checkpoint=tune.Checkpoint(path, storage.filesystem), metrics=metrics)
    )


def keep_two(trial: Any) -> None:
    """Remove what a trial's newest checkpoint, which is about to be registered, makes needless.

    Of those before it the best stays: what is reported may be made of it, and if the newest is damaged, the
    trial goes on from there. Those that the trial passed over and removed, as damaged, don't count: it has
    come to their steps again.
    """
    manager = trial.run_metadata.checkpoint_manager
    known = [
        found
        for found in manager._checkpoint_results
        if Storage(found.checkpoint.filesystem, "").is_finished(found.checkpoint.path)
    ]
    best = min(known, key=lambda found: standing(found.metrics), default=None)
    for found in known:
        if found is not best:
            checkpoint = found.checkpoint
            Storage(checkpoint.filesystem, "").remove(checkpoint.path)
    manager._checkpoint_results = [] if best is None else [best]


@contextmanager
def best_checkpoint(storage: Storage, record: TrialRecord) -> Iterator[Path]:
    """Provide the checkpoint of a trial's best point as a folder here, within.

    Raises CheckpointError if there is none that is whole.
    """
    assert record.best is not None
    path = checkpoint_paths(storage, {record.trial_id: record}).get(record.trial_id)
    if path is None:
        step = int(record.best["step"])
        raise CheckpointError(f"the checkpoint of step {step} of trial {record.trial_id} is missing")
    with storage.here(path) as folder:
        verify_checkpoint(folder)
        yield folder


def checkpoint_paths(storage: Storage, records: Mapping[str, TrialRecord]) -> dict[str, str]:
    """Return where the checkpoint of each trial's best point is, by trial id."""
    paths = {}
    for trial_id, record in records.items():
        for stored in storage.checkpoints(storage.folder_of(trial_id)) if record.best else ():
            if record.best is not None and stored.step == record.best["step"] and stored.index >= 0:
                paths[trial_id] = stored.path
    return paths
