"""Owns the figures of the base alone, which trials are set beside: measured once a sweep, by prompt."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from qlora.config import first_line
from qlora.perplexity import mean_perplexity
from tuning.host_actor import UnfitNodeError
from tuning.host_directory import Hosts, ask_all_devices
from tuning.objective import Objective, UnjudgedError
from workflows.session import FailedError, StoppedError
from workflows.sweep.folder import SweepFolder
from workflows.sweep.start import good_answers


@dataclass(frozen=True)
class ZeroShot:
    """The base's figures by prompt: public perplexity, and the objective's values if that is another."""

    perplexities: Mapping[str, float]
    values: Mapping[str, float]
    objective: Objective

    @property
    def known(self) -> Mapping[str, float]:
        """Return what trials are set beside, by prompt: the objective's values."""
        return self.perplexities if self.objective.is_perplexity else self.values

    def perplexity(self, prompt: str) -> float:
        """Return the public perplexity under a prompt."""
        return self.perplexities.get(prompt, min(self.perplexities.values()))

    def value(self, prompt: str) -> float:
        """Return the objective's value under a prompt."""
        return self.known.get(prompt, self.best)

    @property
    def best(self) -> float:
        """Return the objective's value under the prompt for which it is best."""
        return min(self.known.values(), key=self.objective.score)

    @property
    def words(self) -> str:
        """Write the figures, with prompts where there are several."""
        words = f"public perplexity {_of_prompts(self.perplexities)}"
        return words if not self.values else f"{words}; {self.objective.words} {_of_prompts(self.values)}"


def ask_zero_shot(sweep: SweepFolder, hosts: Hosts, shares: dict[str, float]) -> list[list[Any]]:
    """Ask hosts for the figures of the base alone that the sweep doesn't know yet."""
    is_known = [sweep.zero_shot() is not None]
    questions = ["zero_shot"]
    if not sweep.space.objective.is_perplexity:
        is_known.append(bool(sweep.zero_shot_values()))
        questions.append("zero_shot_values")
    return [] if all(is_known) else [ask_all_devices(hosts, shares, question) for question in questions]


def zero_shot_of(sweep: SweepFolder, asked: Sequence[Sequence[Any]]) -> ZeroShot:
    """Return the figures of the base alone, from what was asked, or kept before.

    Raises FailedError for figures that are no good, and what a host raised if none answers.
    """
    if asked:
        answers = [_first_good(asked[0])]
        if len(asked) > 1:
            answers.append(_judged(asked[1]))
        found = {name: mean_perplexity(values) for name, values in answers[0].items()}
        for value in found.values():
            if not math.isfinite(value):
                raise FailedError(
                    f"the base alone has public perplexity {value}: its weights or dtype are no good"
                )
        sweep.keep_zero_shot(found, answers[1] if len(answers) > 1 else {})
    known = sweep.zero_shot()
    assert known is not None, "it was kept"
    return ZeroShot(known, sweep.zero_shot_values(), sweep.space.objective)


def _judged(questions: Sequence[Any]) -> dict[str, float]:
    """Return the objective's values. Raises FailedError if a function fails on the base's texts."""
    try:
        return _first_good(questions)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UnjudgedError):
            again = "a function is given whatever texts come; mend it, and start another sweep"
            raise FailedError(
                f"{first_line(error.cause)}, which the base alone has written; {again}"
            ) from error
        raise


def _of_prompts(figures: Mapping[str, float]) -> str:
    if len(figures) == 1:
        return f"{next(iter(figures.values())):.4f}"
    return ", ".join(f"{value:.4f} ({name})" for name, value in figures.items())


def _first_good(questions: Sequence[Any]) -> dict[str, Any]:
    """Return the first answer, of those at hand the first by their order; the other questions are dropped.

    Raises the last error if no host answers.
    """
    left = list(questions)
    while True:
        ray.wait(left, fetch_local=False)
        ended, left = ray.wait(left, num_returns=len(left), timeout=0, fetch_local=False)
        found, error = good_answers(ended)
        if found:
            for question in left:  # one that waits for a busy device would be taken for a wish
                ray.cancel(question)
            return found[0]  # type: ignore[no-any-return]
        if not left:
            assert error is not None, "none was good"
            if isinstance(error, UnfitNodeError):
                raise StoppedError(
                    f"{first_line(getattr(error, 'cause', error))}; run the same command again"
                )
            raise error
