"""Owns one trial: an ordinary Ray Tune function trainable that holds a share of a device.

Its work is done by the device's host. It loads nothing heavy: a trial starts in a second.
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune

from qlora.checkpoint_files import CheckpointError, verify_checkpoint
from qlora.config import first_line
from tuning.checkpoints import STOPPED, Storage
from tuning.host_actor import UnfitNodeError
from tuning.host_directory import Hosts, host_of_my_device, leave_my_node_out
from tuning.objective import METRIC
from tuning.orders import SET_ASIDE


def run_trial(config: dict[str, Any], hosts: Hosts, shares: dict[str, float]) -> None:
    """Train one configuration from its last whole checkpoint on. `shares`: what it asked Ray for.

    Each evaluation is reported with a checkpoint; that it diverged, or that its texts can't be judged, is
    reported, too, since trying again would only repeat it; and that it was set aside, for Ray to pause it.
    """
    trial_id, holder = tune.get_context().get_trial_id(), ray.get_runtime_context().get_actor_id()
    host = host_of_my_device(hosts, trial_id)
    with _newest_whole_checkpoint() as (checkpoint, notes):
        try:
            steps = ray.get(host.attach.remote(trial_id, holder, config, checkpoint, notes))
        except UnfitNodeError as error:
            why = getattr(error, "cause", error)  # without Ray's words
            leave_my_node_out(hosts, shares, first_line(why))
            raise
    try:
        for step in steps:
            with tempfile.TemporaryDirectory() as folder:
                metrics = ray.get(host.advance.remote(trial_id, step, folder))
                if "by_hand" in metrics:
                    return
                if SET_ASIDE in metrics:
                    ray.get(host.detach.remote(trial_id, holder))
                    tune.report({METRIC: math.inf, "public_perplexity": math.inf, **metrics})
                    return
                if "diverged" in metrics or "unjudged" in metrics:
                    tune.report({METRIC: math.inf, "public_perplexity": math.inf, **metrics})
                    return
                tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
    finally:
        host.detach.remote(trial_id, holder)  # which another process of the trial may have by now


@contextmanager
def _newest_whole_checkpoint() -> Iterator[tuple[str | None, list[str]]]:
    """Provide, within, the folder of the newest checkpoint that is whole, and what was passed over for it.

    What is damaged is removed: the trial comes to that step again.
    """
    newest, notes = tune.get_checkpoint(), list[str]()
    if newest is None:
        yield None, notes
        return
    (experiment, _, trial), name = str(Path(newest.path).parent).rpartition("/"), Path(newest.path).name
    storage = Storage(newest.filesystem, experiment)
    there = storage.checkpoints(trial)
    last = next((one.step for one in there if Path(one.path).name == name), math.inf)  # unless it is damaged
    known = [one for one in there if (one.step <= last if name == STOPPED else Path(one.path).name <= name)]
    for stored in reversed(known):  # what is newer was not reported
        with storage.here(stored.path) as folder:
            try:
                verify_checkpoint(folder)
            except CheckpointError:
                notes.append(
                    f"trial {trial}: the checkpoint of step {stored.step} is damaged and passed over"
                )
                storage.remove(stored.path)
                continue
            yield str(folder), notes
            return
    yield None, notes
