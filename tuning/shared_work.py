"""Owns the work of a host on its device: training and evaluating its trials together.

Out of memory first gives recorded passes back, then halves the tokens of a pass, and at the fewest has layers
computed again in the backward. Whatever else fails in company is tried again trial by trial, so that only the
trial whose work fails is failed. Refuses to know who asks, and when.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from qlora.base.device import default_token_budget
from qlora.config import BaseModelSettings
from qlora.data.prompts import EncodedExample
from qlora.lora.average import Update, attach_update
from qlora.lora.bank import Adapter, load_bank
from qlora.packed.packing import FEWEST_PASS_TOKENS
from qlora.perplexity import adapter_perplexities
from qlora.training import StepResult, Training, advance_together
from tuning.examples import PromptedExamples
from tuning.objective import Judge, JudgingStoppedError

_Result = TypeVar("_Result")
Request = tuple[Adapter | None, Sequence[EncodedExample]]
WORK = ("training", "compiling", "recording", "evaluating", "writing texts", "waiting")
_log = logging.getLogger(__name__)


@dataclass
class TrialWork:
    """A trial's training on a host, and what it did since its last report."""

    training: Training
    seen: list[StepResult] = field(default_factory=list)
    seconds: float = 0.0

    def forget(self) -> None:
        """Begin a new stretch of steps, after a report."""
        self.seen, self.seconds = [], 0.0


class SharedWork:
    """The base of a device with its adapters, the tokens that a pass may hold, and where time went.

    `recomputes`: see qlora.base.recomputed.
    """

    def __init__(self, base: BaseModelSettings, budget_tokens: int | None, *, recomputes: bool = False):
        self.bank = load_bank(base)
        self.seconds = dict.fromkeys(WORK, 0.0)
        self.notes: list[str] = []
        if recomputes and not self.bank.recompute():
            self.note("layers of this family can't be computed again in the backward: memory may be short")
        self._budget_tokens = self._most_tokens = budget_tokens or default_token_budget()

    def train(self, works: Sequence[TrialWork]) -> list[Exception | None]:
        """Take one optimizer step of each trial; returns what each one's failed with."""
        return self._together(self._train, works)

    def evaluate(self, requests: Sequence[Request]) -> list[list[float] | Exception]:
        """Measure the perplexity of each request's examples under its adapter (None: the bare base).

        Returns the values, or what a request's evaluation failed with.
        """
        values: dict[int, list[float]] = {}

        def measure(places: Sequence[int]) -> list[Exception | None]:
            found = adapter_perplexities(
                self.bank,
                [requests[place] for place in places],
                self._budget_tokens,
                shrink=lambda tokens: self._budget_tokens if self._shrink(has_backward=False) else None,
            )
            values.update(zip(places, found, strict=True))
            return [None] * len(places)

        errors = self._together(measure, range(len(requests)), shrinks_itself=True)
        return [values[place] if error is None else error for place, error in enumerate(errors)]

    def evaluation_seconds(self, examples: Sequence[EncodedExample]) -> float:
        """Measure how long it takes to measure examples under the bare base."""
        started = time.monotonic()
        self.evaluate([(None, examples)])
        return time.monotonic() - started

    def judge(
        self,
        judge: Judge,
        requests: Sequence[tuple[Adapter | None, PromptedExamples]],
        is_over: Callable[[], bool],
    ) -> list[float | Exception]:
        """Judge the texts of each adapter (None: the bare base), or return what that failed with."""
        values: dict[int, float | Exception] = {}

        def judged(places: Sequence[int]) -> list[Exception | None]:
            try:
                found = judge.values(self.bank, [requests[place] for place in places], is_over)
            except JudgingStoppedError as error:  # nobody's fault: there is nothing to try again
                return [error] * len(places)
            values.update(zip(places, found, strict=True))
            return [None] * len(places)

        errors = self._together(judged, range(len(requests)), has_backward=False)
        return [values[place] if error is None else error for place, error in enumerate(errors)]

    def perplexities(self, update: Update, examples: Sequence[EncodedExample]) -> list[float]:
        """Measure the perplexity of each example under an update. Raises what measuring raises."""
        adapter = self.attach(update)
        try:
            (found,) = self.evaluate([(adapter, examples)])
        finally:
            self.bank.detach(adapter)
        if isinstance(found, Exception):
            raise found
        return found

    def attach(self, update: Update) -> Adapter:
        """Put an update on the base, to measure and to save. Raises torch.cuda.OutOfMemoryError."""
        return self.with_room(lambda: attach_update(self.bank, update))

    def with_room(self, work: Callable[[], _Result]) -> _Result:
        """Do work; where recorded passes leave no memory for it they are given back, and it is done again.

        Raises torch.cuda.OutOfMemoryError where there is none either way, and what the work raises.
        """
        try:
            return work()
        except torch.cuda.OutOfMemoryError:
            if self.bank.recorder is None or not self.bank.recorder.pause():
                raise
        return work()

    @contextmanager
    def counted(self, work: str | None) -> Iterator[None]:
        """Add the time within to a kind of work, but for what a recorder did meanwhile."""
        started, before = time.monotonic(), self._recorder_seconds()
        try:
            yield
        finally:
            if work is not None:
                now = self._recorder_seconds()
                recorder = {kind: seconds - before.get(kind, 0.0) for kind, seconds in now.items()}
                self.seconds[work] += time.monotonic() - started - sum(recorder.values())
                for kind, seconds in recorder.items():
                    self.seconds[kind] += seconds

    def _train(self, works: Sequence[TrialWork]) -> list[Exception | None]:
        started = time.monotonic()
        results = advance_together([work.training for work in works], self._budget_tokens)
        seconds = time.monotonic() - started
        errors: list[Exception | None] = []
        for work, result in zip(works, results, strict=True):
            work.seconds += seconds
            if isinstance(result, StepResult):
                work.seen.append(result)
                errors.append(None)
            else:
                errors.append(result)
        return errors

    def _together(
        self,
        work: Callable[[Any], list[Exception | None]],
        members: Sequence[Any],
        *,
        shrinks_itself: bool = False,
        has_backward: bool = True,
    ) -> list[Exception | None]:
        """Do work for all members at once, or for each alone if that fails; returns what each failed with.

        Work that `shrinks_itself` has tried the smallest passes when it is out of memory. What has no
        backward has none computed again.
        """
        how = {"shrinks_itself": shrinks_itself, "has_backward": has_backward}
        while True:
            try:
                return work(members)
            except torch.cuda.OutOfMemoryError as error:
                if not shrinks_itself and self._shrink(has_backward=has_backward):
                    continue
                failure: Exception = error
            except Exception as error:  # whatever it is, it belongs to a member, and the others go on
                _end_if_the_gpu_is_out_of_order()
                failure = error
            if len(members) == 1:
                return [failure.with_traceback(None)]  # a traceback would keep activations
            self.note(f"a shared pass failed and was tried trial by trial: {_first_line(failure)}")
            return [self._together(work, [member], **how)[0] for member in members]

    def _shrink(self, *, has_backward: bool) -> bool:
        """Give recordings back or, if there are none, halve the tokens of a pass.

        At the smallest, have layers computed again, and after that say no; start again with the most.
        """
        torch.cuda.empty_cache()
        if self.bank.recorder is not None and self.bank.recorder.pause():
            self.note("out of memory: recorded passes were given back; they are tried again later")
            return True
        if self._budget_tokens < 2 * FEWEST_PASS_TOKENS:
            self._budget_tokens = self._most_tokens
            if not (has_backward and self.bank.recompute()):
                return False
            self.note("out of memory: layers are computed again in the backward from here on")
            return True
        self._budget_tokens //= 2
        self.note(f"out of memory: passes of {self._budget_tokens} tokens from here on")
        return True

    def note(self, words: str) -> None:
        """Keep what people should know of how the work goes, each thing once."""
        _log.warning(words)
        if words not in self.notes:
            self.notes.append(words)

    def _recorder_seconds(self) -> dict[str, float]:
        return dict(self.bank.recorder.seconds) if self.bank.recorder is not None else {}


def _end_if_the_gpu_is_out_of_order() -> None:
    """End the process if no further call to the GPU can succeed.

    A new host takes its place, and trials come back.
    """
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        _log.exception("the GPU is out of order: this host ends")
        os._exit(1)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
