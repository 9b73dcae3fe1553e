"""Owns what a sweep is judged by: public perplexity, or a figure of the texts that an adapter writes.

Trials report a score, the lower the better, by which schedulers, searchers and rankings compare: the
objective's value, with its sign turned where more of it is better.

Refuses to know how texts are written and compared.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from pydantic import Field, model_validator

from qlora.config import Settings

if TYPE_CHECKING:
    from qlora.lora.bank import Adapter, AdapterBank
    from tuning.examples import PromptedExamples

PERPLEXITY = "public_perplexity"
OF_TEXTS = ("chrf", "bleu", "exact_match")
METRIC = "score"  # what trials report to be compared by, the lower the better
VALUE = "objective"  # what they report of an objective that is not perplexity
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)


class Objective(Settings):
    """Settings of what trials are compared by.

    name: `public_perplexity`; `chrf`, `bleu` or `exact_match` of greedy texts for the public examples; or
    `MODULE:FUNCTION`, called with the examples and the texts. mode: whether less or more of a function's
    value is better, `max` if it does not say. max_new_tokens: of a text.
    """

    name: str = PERPLEXITY
    mode: Literal["min", "max"] | None = None
    max_new_tokens: int = Field(128, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.name not in (PERPLEXITY, *OF_TEXTS) and not _FUNCTION.fullmatch(self.name):
            known = ", ".join((PERPLEXITY, *OF_TEXTS))
            raise ValueError(f"{self.name!r} is no objective; there are {known}, and MODULE:FUNCTION")
        own = "min" if self.name == PERPLEXITY else "max"
        if not self.is_function and self.mode not in (None, own):
            raise ValueError(f"of {self.name} there can only be {'less' if own == 'min' else 'more'}")
        return self

    @property
    def is_perplexity(self) -> bool:
        """Tell whether it is public perplexity, for which no text is written."""
        return self.name == PERPLEXITY

    @property
    def is_function(self) -> bool:
        """Tell whether it is a function of people's own."""
        return ":" in self.name

    @property
    def more_is_better(self) -> bool:
        """Tell whether a higher value is better."""
        return not self.is_perplexity and self.mode != "min"

    @property
    def label(self) -> str:
        """Return what columns and axes call it."""
        return "ppl" if self.is_perplexity else self.name.rpartition(":")[2]

    @property
    def words(self) -> str:
        """Return what sentences call it."""
        return "public perplexity" if self.is_perplexity else self.label

    def score(self, value: float) -> float:
        """Return what trials are compared by."""
        return -value if self.more_is_better else value

    def value_at(self, point: Mapping[str, Any]) -> float:
        """Return its value at a point of a trial's curve."""
        return float(point[PERPLEXITY] if self.is_perplexity else point.get(VALUE, math.nan))


class UnjudgedError(RuntimeError):
    """A function of people's own that fails on texts; it would again."""


class JudgingStoppedError(RuntimeError):
    """Texts that are not written to their end, since the host is to do no more."""


class Judge(Protocol):
    """An object that says how good adapters are by the texts that they write."""

    def values(
        self,
        bank: "AdapterBank",
        requests: Sequence[tuple["Adapter | None", "PromptedExamples"]],
        is_over: Callable[[], bool],
    ) -> list[float | UnjudgedError]:
        """Return the objective's value of each adapter (None: the bare base) on its public examples.

        Or what a function of people's own failed with on its texts. `is_over` is asked again and again; once
        it says so, JudgingStoppedError is raised.
        """


def standing(point: Mapping[str, float]) -> tuple[float, float]:
    """Return what points are ranked by: their scores and, where these are equal, their perplexities."""
    return score_of(point), point[PERPLEXITY]


def score_of(point: Mapping[str, float]) -> float:
    """Return what a point of a curve is compared by; points from before have perplexity alone."""
    return point[METRIC] if METRIC in point else point[PERPLEXITY]
