"""Owns what a trial asks Ray for, and whether Ray could ever give it. Loads nothing heavy."""

import math

from qlora.config import InputError
from tuning.space import Space


def trial_shares(space: Space, side_by_side: int = 1) -> dict[str, float]:
    """What a trial asks Ray for: its CPUs, and its share of a GPU by `trials_per_gpu` if that is given. `side_by_side`: trials of a GPU
    where the space leaves that to the plan."""
    gpu = space.resources_per_trial.gpu
    if space.trials_per_gpu is not None:
        trials = space.trials_per_gpu if isinstance(space.trials_per_gpu, int) else side_by_side
        gpu = math.floor(1e4 / trials) / 1e4  # Ray counts in ten thousandths
    return {"CPU": space.resources_per_trial.cpu, "GPU": gpu}


def check_resources(shares: dict[str, float], available: dict[str, float]) -> None:
    """Raise InputError if no trial could ever be placed on a Ray of these resources; none given means a cluster that may grow."""
    if not available:
        return
    for name, wanted in shares.items():
        if wanted > available.get(name, 0):
            raise InputError(
                "resources_per_trial",
                f"a trial asks for {wanted:g} {name}, but Ray has {available.get(name, 0):g}; "
                f"lower it with --set resources_per_trial.{name.lower()}=N"
                + (" --set trials_per_gpu=null" if name == "GPU" else ""),
            )
