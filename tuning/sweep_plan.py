"""Owns the plan of a sweep on devices of one kind or several: a plan for each kind.

All trials ask Ray for the same share of a GPU, the one that the smallest kind has room for; passes are as
large as each kind allows.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora.config import InputError
from qlora.data.prompts import EncodedExample
from tuning.device import Device
from tuning.model_size import ModelSize
from tuning.plan import Plan, make_plan
from tuning.plan_memory import TextsMemory
from tuning.plan_time import START_SECONDS
from tuning.space import Space


@dataclass(frozen=True)
class SweepPlan:
    """The needs of a sweep.

    kinds: the plan of each kind of device, by its name. seconds: with all devices together.
    """

    kinds: Mapping[str, Plan]
    seconds: float
    seconds_without_stopping: float

    @property
    def trials(self) -> int:
        """Return the trials side by side on a device, at least."""
        return min(plan.trials for plan in self.kinds.values())

    @property
    def num_devices(self) -> int:
        """Count the devices."""
        return sum(plan.num_devices for plan in self.kinds.values())

    @property
    def gpu_seconds(self) -> float:
        """Return the seconds of all devices, each counted as a whole."""
        return self.num_devices * self.seconds

    @property
    def gpu_seconds_without_stopping(self) -> float:
        """Return the seconds of all devices if no trial is stopped."""
        return self.num_devices * self.seconds_without_stopping

    @property
    def peak_bytes(self) -> int:
        """Return the memory to be expected on the fullest device."""
        return max(plan.peak_bytes for plan in self.kinds.values())

    @property
    def disk_bytes(self) -> int:
        """Return what checkpoints take at most."""
        return max(plan.disk_bytes for plan in self.kinds.values())

    @property
    def mean_disk_bytes(self) -> int:
        """Return what checkpoints take if trials have middling settings."""
        return max(
            plan.disk_bytes * plan.mean_adapter_bytes // plan.adapter_bytes for plan in self.kinds.values()
        )

    @property
    def recomputing(self) -> frozenset[str]:
        """Return the names of the devices on which layers are computed again in the backward."""
        return frozenset(name for name, plan in self.kinds.items() if plan.recomputes)

    @property
    def budgets(self) -> dict[str, int]:
        """Return the tokens that a pass may hold on each kind of device, by its name."""
        return {name: plan.budget_tokens for name, plan in self.kinds.items()}


def make_sweep_plan(
    space: Space,
    train: Sequence[EncodedExample],
    public: Sequence[EncodedExample],
    size: ModelSize,
    devices: Sequence[Device],
    num_devices: int,
    texts: TextsMemory | None = None,
) -> SweepPlan:
    """Plan a sweep on these devices and as many more, of the commonest kind, as make `num_devices`.

    `texts`: see `make_plan`.

    Raises InputError as `make_plan` does, naming the kind if there are several.
    """
    counts = Counter(device.name for device in devices)
    counts[counts.most_common(1)[0][0]] += max(0, num_devices - len(devices))
    smallest = {
        name: min((device for device in devices if device.name == name), key=lambda device: device.free_bytes)
        for name in counts
    }

    def plan_kinds(space: Space) -> dict[str, Plan]:
        found = {}
        for name, device in smallest.items():
            try:
                found[name] = make_plan(
                    space, train, public, size, device, counts[name], counts.total() - counts[name], texts
                )
            except InputError as error:
                if len(smallest) == 1:
                    raise
                mend = "; accelerator_type leaves kinds of GPU out" if space.wants_gpu else ""
                raise InputError(error.where, f"on {name}: {error.problem}{mend}") from None
        return found

    trials_seconds = math.inf if space.budget is None else space.budget.seconds(counts.total())
    most = START_SECONDS + trials_seconds
    kinds = plan_kinds(space)
    if space.wants_gpu and len(kinds) > 1:
        trials = min(plan.trials for plan in kinds.values())
        kinds = plan_kinds(space.model_copy(update={"trials_per_gpu": trials}))
    return SweepPlan(
        kinds,
        min(most, _together([plan.seconds for plan in kinds.values()])),
        min(most, _together([plan.seconds_without_stopping for plan in kinds.values()])),
    )


def _together(seconds: Sequence[float]) -> float:
    """Return the seconds of work that kinds of devices share, each of which would take so many alone."""
    return START_SECONDS + 1 / sum(1 / max(one - START_SECONDS, 1e-9) for one in seconds)
