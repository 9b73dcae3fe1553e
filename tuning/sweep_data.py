"""Owns what a sweep's hosts are given to work on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora.lora.peft_folder import AdapterFiles
from tuning.examples import SweepExamples
from tuning.objective import Judge
from tuning.space import Space


@dataclass(frozen=True)
class SweepData:
    """The data that every trial of a sweep works on, sent to the hosts once.

    budget_tokens: of a pass; None for the device's default. start: the adapter that every trial starts from;
    None for fresh ones. budgets: tokens of a pass on devices of a name, in place of budget_tokens. judge: of
    texts, if the objective is of such.
    """

    space: Space
    examples: SweepExamples
    budget_tokens: int | None = None
    start: AdapterFiles | None = None
    budgets: Mapping[str, int] = field(default_factory=dict)
    judge: Judge | None = None
