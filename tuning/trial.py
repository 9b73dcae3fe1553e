"""Owns one trial: an ordinary Ray Tune function trainable that holds a share of a device.

Its work is done by the device's host. It loads nothing heavy: a trial starts in a second.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune

from tuning.host_directory import host_of_my_device


def run_trial(config: dict[str, Any], hosts: Any) -> None:
    """Train one configuration from its last whole checkpoint on.

    Each evaluation is reported with a checkpoint.
    """
    trial_id, holder = tune.get_context().get_trial_id(), ray.get_runtime_context().get_actor_id()
    host = host_of_my_device(hosts, trial_id)
    with _own_checkpoints() as checkpoints:
        steps = ray.get(host.attach.remote(trial_id, holder, config, checkpoints))
    try:
        for step in steps:
            with tempfile.TemporaryDirectory() as folder:
                metrics = ray.get(host.advance.remote(trial_id, step, folder))
                tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
    finally:
        host.detach.remote(trial_id)


@contextmanager
def _own_checkpoints() -> Iterator[list[str]]:
    """Give the trial's checkpoints as folders here, newest first.

    A damaged one can be passed over for the one before it.
    """
    newest = tune.get_checkpoint()
    if newest is None:
        yield []
        return
    with newest.as_directory() as folder:
        yield [folder, *map(str, sorted(Path(newest.path).parent.glob("checkpoint_*"), reverse=True))]
