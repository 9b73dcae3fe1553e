"""Owns a sweep's plan: by its devices' speeds before it starts, by what hosts measure once they work."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import ray

from inference.room import TextsMemory, pass_width
from tuning.device import Device
from tuning.host_directory import Hosts
from tuning.plan_time import START_SECONDS, evaluation_seconds
from tuning.sweep_plan import SweepPlan, make_sweep_plan
from workflows.sweep.best import answer_of
from workflows.sweep.prepared import PreparedSweep

_FEW = 4  # public examples that a CPU is timed with: all of them would take long


def plan_on(prepared: PreparedSweep, devices: Sequence[Device], num_devices: int) -> SweepPlan:
    """Plan a sweep on devices. Raises InputError as `make_sweep_plan` does."""
    size, texts = prepared.base.size, _texts_memory(prepared)
    return make_sweep_plan(prepared.space, *prepared.planned(), size, devices, num_devices, texts)


def _texts_memory(prepared: PreparedSweep) -> TextsMemory | None:
    """Return what counts the memory of trials' texts, if they write some."""
    objective, size = prepared.space.objective, prepared.base.size
    if objective.is_perplexity:
        return None
    _, public = prepared.planned()
    return TextsMemory(
        num_texts=len(public),
        longest=max(len(example.prompt) for example in public),
        max_new_tokens=objective.max_new_tokens,
        vocabulary=size.vocabulary,
        cache_width=size.cache_width,
        pass_width=pass_width(size.hidden, size.mlp_width // size.num_layers),
    )


def as_measured(
    plan: SweepPlan, prepared: PreparedSweep, devices: Sequence[Device], hosts: Hosts, began: float
) -> tuple[SweepPlan, str]:
    """Return a plan with its time by what evaluating the base takes, and by what starting since `began` took.

    A CPU's speeds were measured while other processes loaded; the base itself says more. A GPU's are its own,
    and one evaluation there is mostly its host's work. If no host can tell, or devices are of several kinds,
    the plan keeps its speeds. The words say which it is.
    """
    found, words = plan, "now that the base is there"
    if devices[0].kind == "cpu" and len(plan.kinds) == 1:
        train, public = prepared.planned()
        some = public[:_FEW]
        with suppress(ray.exceptions.RayError):
            seconds = answer_of(hosts, "evaluation_seconds", some)
            slower = seconds / evaluation_seconds(train, some, prepared.base.size, devices[0])
            as_fast = [replace(one, speed=one.speed / slower) for one in devices]
            found, words = plan_on(prepared, as_fast, plan.num_devices), "by what the base alone took"
    later = time.monotonic() - began - START_SECONDS
    seconds, unstopped = found.seconds + later, found.seconds_without_stopping + later
    return replace(plan, seconds=seconds, seconds_without_stopping=unstopped), words
