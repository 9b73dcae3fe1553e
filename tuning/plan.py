"""Owns the plan: what a sweep is about to do, in numbers, before anything starts."""

from collections.abc import Sequence

from qlora.config import InputError
from qlora.packing import shared_prefix_length
from qlora.prompts import EncodedExample
from qlora.training import make_timetable
from tuning.space import Asha, Space


def describe_plan(space: Space, train: Sequence[EncodedExample], public: Sequence[EncodedExample]) -> str:
    """A few lines: base, data, trials, schedule lengths and rungs."""
    prefix = shared_prefix_length([example.prompt for example in (*train, *public)])
    tokens = sum(example.num_tokens for example in train)
    fixed = space.trial_settings({})
    searched = ", ".join(f"{key} {name}{value}" for key, sampler in space.search.items() for name, value in sampler.items())
    lines = [
        f"base        {space.base_model.name} ({space.base_model.quantization}, {space.base_model.dtype})",
        f"train       {len(train)} examples of {space.data.train}, {tokens / len(train):.0f} tokens on average",
        f"public      {len(public)} examples of {space.data.public}; all prompts share {prefix} tokens",
        f"search      {searched}",
        f"trials      {space.num_trials} by {space.searcher.type} search, each {space.resources_per_trial.cpu:g} CPU and "
        f"{space.resources_per_trial.gpu:g} GPU",
        f"epoch       {make_timetable(len(train), fixed).steps_per_epoch} steps of {fixed.batch_size} examples",
    ]
    if isinstance(space.scheduler, Asha):
        unit = "% of a trial's schedule" if space.scheduler.time_attr == "schedule_percent" else " steps"
        rungs = ", ".join(f"{rung:g}" for rung in space.scheduler.rungs)
        lines.append(f"ASHA        compares at {rungs}{unit}, keeps 1 of {space.scheduler.reduction_factor:g}")
    return "\n".join(lines)


def check_resources(space: Space, available: dict[str, float]) -> None:
    """Raise InputError if no trial could ever be placed on a Ray of these resources; none given means a cluster that may grow."""
    if not available:
        return
    for name, wanted in (("CPU", space.resources_per_trial.cpu), ("GPU", space.resources_per_trial.gpu)):
        if wanted > available.get(name, 0):
            raise InputError("resources_per_trial", f"a trial asks for {wanted:g} {name}, but Ray has {available.get(name, 0):g}; "
                             f"lower it with --set resources_per_trial.{name.lower()}=N")
