"""Owns the plan in words: before a sweep starts, and beside what was measured when it has ended."""

from collections.abc import Mapping, Sequence

from qlora.cost import Cost, in_money
from qlora.data.prompts import EncodedExample, cut_in_words
from qlora.packed.packing import whole_group
from qlora.training import make_timetable
from tuning.known_devices import MEASURED
from tuning.plan import Plan
from tuning.plan_memory import gib
from tuning.progress import clock
from tuning.space import Space
from tuning.strategy import Asha, Rounds
from tuning.sweep_plan import SweepPlan

# What a machine adds to what a slow card is expected to take: as much again by half, and on a fresh one the
# seconds of compiling kernels and of reading files for the first time.
_WARY, _FRESH_SECONDS = 1.5, 45


def describe_plan(
    space: Space,
    train: Sequence[EncodedExample],
    public: Sequence[EncodedExample],
    words: Mapping[str, str],
    plan: SweepPlan | None,
    num_there: int | None = None,
) -> str:
    """Describe base, data, trials, schedule lengths and rungs, memory, disk and time.

    `words`: what the rows of train and public hold. Without a plan, what needs none. `num_there`: devices
    that are there already (default: all).
    """
    lines = [*_work_lines(space, train, public, words)]
    if plan is not None:
        lines += [*_plan_lines(plan), *time_lines(space, plan, num_there)]
    else:
        lines.append("device      no GPU here to plan for")
    return "\n".join(lines)


def describe_range(
    space: Space,
    train: Sequence[EncodedExample],
    public: Sequence[EncodedExample],
    words: Mapping[str, str],
    quick: SweepPlan,
    slow: SweepPlan,
    price: float | None = None,
) -> str:
    """Describe a sweep as `describe_plan` does, on cards of one kind between a quick and a slow one.

    `price`: of a card and hour, in any currency.
    """
    name, kind = next(iter(quick.kinds.items()))
    slow_seconds = (slow.seconds, slow.seconds_without_stopping)
    seconds = (quick.seconds, *(_WARY * one + _FRESH_SECONDS for one in slow_seconds))
    least, likely, most = map(_minutes, seconds)
    lines = [
        *_work_lines(space, train, public, words),
        *_kind_lines(kind, name, False),
        f"disk        up to {gib(quick.disk_bytes)} of checkpoints, two a trial",
        *_unmeasured(name),
        f"time        {least} to {likely} on {quick.num_devices} x {name}, going by its data sheet"
        + _unstopped(space, f"; up to {most}"),
    ]
    low, high, highest = (f"{quick.num_devices * one:.0f}" for one in seconds)
    lines.append(f"cost        {low} to {high} GPU-seconds" + _unstopped(space, f"; up to {highest}"))
    if price is not None:
        of_a_second = quick.num_devices * price / 3600
        low, high, highest = (in_money(one * of_a_second) for one in seconds)
        money = f"money       {low} to {high} at {price:g} a card and hour"
        lines.append(money + _unstopped(space, f"; up to {highest}"))
    return "\n".join(lines)


def _unstopped(space: Space, most: str) -> str:
    """Say what it is if nothing is stopped, where something may be."""
    return "" if space.scheduler.type == "fifo" else f"{most} if nothing is stopped"


def _unmeasured(name: str) -> list[str]:
    if name in MEASURED:
        return []
    return [f"card        no {name} was measured; what follows holds if it is like {' and '.join(MEASURED)}"]


def time_lines(space: Space, plan: SweepPlan, num_there: int | None = None, source: str = "") -> list[str]:
    """Write how long a sweep is expected to take, and what its GPUs cost if it asks for any.

    `source`: by what, if not by the devices' speeds.
    """
    devices = "one device" if plan.num_devices == 1 else f"{plan.num_devices} devices"
    if num_there is not None and num_there < plan.num_devices:
        devices += f" ({num_there} there, the others may come)"
    likely, unstopped = _minutes(plan.seconds), _minutes(plan.seconds_without_stopping)
    lines = [f"time        about {likely} on {devices}{source}" + _unstopped(space, f", {unstopped}")]
    if not space.wants_gpu:
        return lines
    seconds, price = (plan.gpu_seconds, plan.gpu_seconds_without_stopping), space.price_per_gpu_hour
    likely, unstopped = (f"{one:.0f}" for one in seconds)
    lines.append(f"cost        about {likely} GPU-seconds" + _unstopped(space, f", {unstopped}"))
    if price is not None:
        likely, unstopped = (in_money(Cost(one, price).money or 0) for one in seconds)
        lines.append(
            f"money       about {likely} at {price:g} a card and hour" + _unstopped(space, f", {unstopped}")
        )
    return lines


def compare_with_run(plan: SweepPlan, peak_gib: float, seconds: float) -> str:
    """Set the plan's peak memory (of a GPU) and time beside those measured."""
    memory = f"peak memory {gib(plan.peak_bytes)} planned, {peak_gib:.1f} GiB measured; " if peak_gib else ""
    return f"plan        {memory}time {clock(plan.seconds)} planned, {clock(seconds)} measured"


def _work_lines(
    space: Space, train: Sequence[EncodedExample], public: Sequence[EncodedExample], words: Mapping[str, str]
) -> list[str]:
    prefix = whole_group([*train, *public]).prefix_length
    mean_tokens = sum(example.num_tokens for example in train) / len(train)
    fixed = space.trial_settings({})
    steps_per_epoch = make_timetable(len(train), fixed).steps_per_epoch
    searched = ", ".join(
        f"{key} {name}{value}" for key, sampler in space.search.items() for name, value in sampler.items()
    )
    lines = [
        f"base        {space.base_model.name} ({space.base_model.quantization}, {space.base_model.dtype})",
        f"train       {len(train)} examples of {space.data.train_name} ({words['train']}), "
        f"{mean_tokens:.0f} tokens on average{_cut(train)}",
        f"public      {len(public)} examples of {space.data.public_name} ({words['public']}); "
        f"all prompts share {prefix} tokens{_cut(public)}",
        *([f"holdout     {words['holdout']}, of {space.data.holdout_name}"] if "holdout" in words else []),
        f"search      {searched}",
        f"trials      {space.num_trials} by {space.searcher.type} search",
        f"epoch       {steps_per_epoch} steps of {fixed.batch_size} examples",
    ]
    if isinstance(space.scheduler, Asha):
        unit = "% of a trial's schedule" if space.scheduler.time_attr == "schedule_percent" else " steps"
        rungs = ", ".join(f"{rung:g}" for rung in space.scheduler.rungs)
        keeps = f"keeps 1 of {space.scheduler.reduction_factor:g}"
        longest = max(_steps(space, len(train)))
        is_late = space.scheduler.time_attr == "step" and min(space.scheduler.rungs) > longest
        none = f"; no trial has more than {longest} steps, so that none is compared" if is_late else ""
        lines.append(f"ASHA        compares at {rungs}{unit}, {keeps}{none}")
    elif isinstance(space.scheduler, Rounds):
        rounds = space.scheduler
        shortest = min(_steps(space, len(train)))
        whole = f"; trials of {shortest} steps are whole before that" if shortest <= rounds.steps else ""
        compared = f"compared after {rounds.steps} steps, {rounds.kept} go on{whole}"
        lines.append(f"rounds      of {rounds.trials} trials, {compared}")
    if not space.objective.is_perplexity:
        length = space.objective.max_new_tokens
        texts = f"{len(public)} texts of up to {length} tokens at each evaluation"
        lines.append(f"objective   {space.objective.name}, of {texts}, not counted in the time below")
    if space.budget is not None:
        lines.append(f"budget      {space.budget.words}; the sweep then ends with what it has")
    return lines


def _steps(space: Space, num_examples: int) -> list[int]:
    """Return the steps of the shortest and longest trials: of extreme epochs, batches and examples."""
    counts = space.values("train_examples") if "train_examples" in space.search else [num_examples]
    return [
        make_timetable(int(count), space.trial_settings({"epochs": epochs, "batch_size": batch})).total_steps
        for count in counts
        for epochs in space.values("epochs")
        for batch in map(int, space.values("batch_size"))
    ]


def _cut(examples: Sequence[EncodedExample]) -> str:
    words = cut_in_words(examples)
    return words and f", {words}"


def _plan_lines(plan: SweepPlan) -> list[str]:
    kinds = [
        line for name, kind in plan.kinds.items() for line in _kind_lines(kind, name, len(plan.kinds) > 1)
    ]
    return [*kinds, f"disk        up to {gib(plan.disk_bytes)} of checkpoints, two a trial"]


def _kind_lines(plan: Plan, name: str, is_one_of_several: bool) -> list[str]:
    of_kind = f"{plan.num_devices} x {name}: " if is_one_of_several else ""
    texts = f" or, in turn with them, texts {gib(plan.text_bytes)}" if plan.text_bytes else ""
    return [
        f"device      {of_kind}{plan.trials} trials side by side on one base, passes of up to "
        f"{plan.budget_tokens} tokens"
        + (", layers computed again in the backward" if plan.recomputes else ""),
        f"memory      {of_kind}{gib(plan.peak_bytes)} a device: base {gib(plan.base_bytes)}, adapters and "
        f"optimizers {plan.trials} x {gib(plan.fullest_adapters_bytes / plan.trials)}, activations "
        f"{gib(plan.activation_bytes)}{texts}; at most {gib(plan.most_bytes)}",
    ]


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
