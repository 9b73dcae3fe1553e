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
    texts, if the objective is of such. recomputing: names of devices on which layers are computed again.
    """

    space: Space
    examples: SweepExamples
    budget_tokens: int | None = None
    start: AdapterFiles | None = None
    budgets: Mapping[str, int] = field(default_factory=dict)
    judge: Judge | None = None
    recomputing: frozenset[str] = frozenset()

    def for_device(self, name: str) -> tuple[int | None, bool]:
        """Return the tokens of a pass on devices of this name, and whether layers are computed again."""
        is_planned = name in self.budgets
        recomputes = name in self.recomputing if is_planned else bool(self.recomputing)
        return self.budgets.get(name, self.budget_tokens), recomputes
