"""Owns a host's work: one base on one device, and all trials that are attached to it, trained and evaluated together.

One thread does everything that touches the device: whoever calls leaves a wish and waits. Between two steps the thread
carries out what was asked for; a trial that asks for nothing (it waits at a rung, or was stopped) costs the others
nothing. Checkpoints are written by threads of their own. Refuses to know how hosts are found and how trials report.
"""

import logging
import math
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from qlora.base.model import default_token_budget
from qlora.checkpoint import CheckpointContent, CheckpointError, load_checkpoint, verify_checkpoint
from qlora.config import TrialSettings
from qlora.data.prompts import EncodedExample
from qlora.lora.bank import load_bank
from qlora.perplexity import adapter_perplexities, mean_perplexity
from qlora.training import DivergedError, StepResult, Timetable, Training, advance_together
from tuning.space import Space

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")
WORK = ("training", "compiling", "recording", "evaluating", "waiting")
_WRITERS = 4  # of checkpoints at once: trials of one length end together
_FEWEST_TOKENS = 64  # of a pass: below that, out of memory is not a matter of passes


@dataclass(frozen=True)
class SweepData:
    """What every trial of a sweep works on, sent to the hosts once. `budget_tokens`: of a pass; None for the device's default. `start`:
    the files of a PEFT folder that every trial starts from; none for fresh adapters."""

    space: Space
    train: list[EncodedExample]
    public: list[EncodedExample]
    budget_tokens: int | None = None
    start: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Seat:
    """An attached trial: who holds it, what it was asked to reach, and what it did since its last report."""

    holder: str
    training: Training
    goal: int | None = None
    folder: str = ""
    reply: "Future[dict[str, Any]]" = field(default_factory=Future)
    seen: list[StepResult] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def at_goal(self) -> bool:
        """Whether it has only to be evaluated."""
        return self.goal is not None and self.training.step >= self.goal


class Host:
    """Trains attached trials in shared passes. Its methods may be called from many threads and block until they are done."""

    def __init__(self, data: SweepData, num_threads: int):
        torch.set_num_threads(num_threads)
        self._data = data
        self._budget_tokens = self._most_tokens = data.budget_tokens or default_token_budget()
        self._seats: dict[str, Seat] = {}
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._bank = load_bank(data.space.base_model)
        self._writers = ThreadPoolExecutor(_WRITERS)
        self._seconds = dict.fromkeys(WORK, 0.0)
        threading.Thread(target=self._work, daemon=True).start()

    def zero_shot(self) -> list[float]:
        """Perplexity of each public example under the base without an adapter."""

        def score() -> list[float]:
            while True:
                try:
                    return adapter_perplexities(self._bank, [(None, self._data.public)], self._budget_tokens)[
                        0
                    ]
                except torch.cuda.OutOfMemoryError:
                    if not self._shrink():
                        raise

        return self._ask(score)

    def attach(
        self, trial_id: str, holder: str, config: dict[str, Any], checkpoints: Sequence[str]
    ) -> list[int]:
        """Give a trial a seat, at its newest whole checkpoint of those given (newest first) if there is any; returns the steps at which
        it is yet to be evaluated. A holder has one seat: what it held before is given up."""
        settings = self._data.space.trial_settings(config)
        weights = self._bank.fresh_weights(settings)  # here, where no other trial waits for it
        return self._ask(lambda: self._attach(trial_id, holder, settings, weights, checkpoints))

    def advance(self, trial_id: str, step: int, folder: str) -> dict[str, Any]:
        """Train a trial up to a step, evaluate it, write a checkpoint into the folder; returns its metrics, and as `perplexities` those of
        the public examples.

        Raises DivergedError; KeyError for a trial without a seat.
        """

        def start() -> "Future[dict[str, Any]]":
            seat = self._seats[trial_id]
            seat.goal, seat.folder, seat.reply, seat.seen, seat.seconds = step, folder, Future(), [], 0.0
            return seat.reply

        return self._ask(start).result()

    def detach(self, trial_id: str) -> None:
        """Take a trial's seat and memory back, if it has one."""
        self._ask(lambda: self._leave(trial_id))

    def seconds(self) -> dict[str, float]:
        """Since the first trial came: seconds of training, of compiling kernels and recording passes, of evaluating, and of waiting for
        trials and letting them in and out."""
        return dict(self._seconds)

    def _ask(self, call: Callable[[], _Answer]) -> _Answer:
        reply: Future[_Answer] = Future()
        with self._changed:
            self._calls.append((call, reply))
            self._changed.notify()
        return reply.result()

    def _work(self) -> None:
        while True:
            self._turn()

    def _turn(self) -> None:
        """Wait for work, then do one round of it. A method of its own: what it holds of trials goes when it ends."""
        with self._changed, self._counted("waiting" if self._seats else None):
            self._changed.wait_for(
                lambda: self._calls or any(seat.goal is not None for seat in self._seats.values())
            )
            calls, self._calls = self._calls, deque()
        with self._counted("waiting" if self._seats else None):
            for call, reply in calls:
                _settle(reply, call)
        asked = [seat for seat in self._seats.values() if seat.goal is not None]
        for work, step, seats in (
            ("evaluating", self._evaluate, [seat for seat in asked if seat.at_goal]),
            ("training", self._train, [seat for seat in asked if not seat.at_goal]),
        ):
            if seats:
                with self._counted(work):
                    self._with_room(step, seats)

    @contextmanager
    def _counted(self, work: str | None) -> Iterator[None]:
        """Add the time within to a kind of work, but for what a recorder did meanwhile."""
        started, before = time.monotonic(), self._recorder_seconds()
        yield
        if work is not None:
            now = self._recorder_seconds()
            self._seconds[work] += time.monotonic() - started - sum(now.values()) + sum(before.values())
            for kind, seconds in now.items():
                self._seconds[kind] += seconds - before.get(kind, 0.0)

    def _recorder_seconds(self) -> dict[str, float]:
        return dict(self._bank.recorder.seconds) if self._bank.recorder is not None else {}

    def _with_room(self, step: Callable[[list[Seat]], None], seats: list[Seat]) -> None:
        """Out of memory halves the tokens of a pass; the next turn tries again. When that is no help, whoever fits alone goes on. Any
        other failure is that of the trials that took part."""
        try:
            step(seats)
        except torch.cuda.OutOfMemoryError as error:
            if self._shrink():
                return
            if len(seats) == 1:
                self._fail(seats, error)
                return
            for seat in seats:
                while seat.goal is not None and not self._done_alone(step, seat):
                    pass
        # whatever it is, it belongs to the callers, and this thread must go on
        except Exception as error:
            _end_if_the_gpu_is_out_of_order()
            self._fail(seats, error)

    def _done_alone(self, step: Callable[[list[Seat]], None], seat: Seat) -> bool:
        try:
            step([seat])
        except torch.cuda.OutOfMemoryError as error:
            if self._shrink():
                return False
            self._fail([seat], error)
        return True

    def _shrink(self) -> bool:
        """Give up recordings or, if there are none, halve the tokens of a pass; at the smallest, say no and start again with the most."""
        torch.cuda.empty_cache()
        if self._bank.recorder is not None and self._bank.recorder.stop():
            _log.warning("out of memory: passes are recorded no more")
            return True
        if self._budget_tokens < 2 * _FEWEST_TOKENS:
            self._budget_tokens = self._most_tokens
            return False
        self._budget_tokens //= 2
        _log.warning("out of memory: passes of %d tokens from here on", self._budget_tokens)
        return True

    def _train(self, seats: list[Seat]) -> None:
        started = time.monotonic()
        results = advance_together([seat.training for seat in seats], self._budget_tokens)
        seconds = time.monotonic() - started
        for seat, result in zip(seats, results, strict=True):
            seat.seconds += seconds
            if isinstance(result, DivergedError):
                self._fail([seat], result)
            else:
                seat.seen.append(result)

    def _evaluate(self, seats: list[Seat]) -> None:
        found = adapter_perplexities(
            self._bank, [(seat.training.adapter, self._data.public) for seat in seats], self._budget_tokens
        )
        for seat, values in zip(seats, found, strict=True):
            metrics = {**_metrics(seat, mean_perplexity(values)), "perplexities": values}
            content, seat.goal = CheckpointContent.of(seat.training), None
            self._writers.submit(_settle, seat.reply, partial(_written, content, Path(seat.folder), metrics))

    def _fail(self, seats: list[Seat], error: Exception) -> None:
        for seat in seats:
            if seat.goal is not None:
                seat.goal = None
                # a traceback would keep activations
                seat.reply.set_exception(error.with_traceback(None))

    def _attach(
        self,
        trial_id: str,
        holder: str,
        settings: TrialSettings,
        weights: torch.Tensor,
        checkpoints: Sequence[str],
    ) -> list[int]:
        for other in [
            name for name, seat in self._seats.items() if seat.holder == holder or name == trial_id
        ]:
            self._leave(other)
        training = Training(self._bank, self._data.train, settings, weights)
        self._start_from_adapter(training)
        for folder in checkpoints:
            try:
                verify_checkpoint(Path(folder))
            except CheckpointError as error:
                print(f"passing over a damaged checkpoint: {error}")
                continue
            load_checkpoint(Path(folder), training)
            break
        self._seats[trial_id] = Seat(holder, training)
        stops = evaluation_steps(
            training.timetable, self._data.space.scheduler, settings.evaluations_per_epoch
        )
        return sorted(step for step in stops if step > training.step)

    def _start_from_adapter(self, training: Training) -> None:
        if self._data.start:
            with tempfile.TemporaryDirectory() as folder:
                for name, content in self._data.start.items():
                    (Path(folder) / name).write_bytes(content)
                self._bank.load(training.adapter, Path(folder))

    def _leave(self, trial_id: str) -> None:
        seat = self._seats.pop(trial_id, None)
        if seat is None:
            return
        self._bank.detach(seat.training.adapter)
        if seat.goal is not None:
            seat.reply.set_exception(RuntimeError("the trial was detached"))


def evaluation_steps(timetable: Timetable, scheduler: Any, evaluations_per_epoch: int) -> set[int]:
    """Steps after which a trial is evaluated: the scheduler's rungs, and equal parts of every epoch up to its end."""
    epochs = sum(timetable.stages)
    parts = {
        math.ceil(part * timetable.steps_per_epoch / evaluations_per_epoch)
        for part in range(1, evaluations_per_epoch + 1)
    }
    steps = {epoch * timetable.steps_per_epoch + part for epoch in range(epochs) for part in parts}
    if scheduler.type == "asha":
        scale = Fraction(
            timetable.total_steps, 100 if scheduler.time_attr == "schedule_percent" else timetable.total_steps
        )
        steps |= {math.ceil(Fraction(rung) * scale) for rung in (*scheduler.rungs, scheduler.max_t)}
    return {step for step in steps if 1 <= step <= timetable.total_steps}


def _metrics(seat: Seat, perplexity: float) -> dict[str, float]:
    training, seen = seat.training, seat.seen
    on_gpu = training.bank.device.type == "cuda"
    return {
        "public_perplexity": perplexity,
        "training_loss": sum(result.loss for result in seen) / max(len(seen), 1),
        "learning_rate": seen[-1].learning_rate if seen else 0.0,
        "step": training.step,
        "epoch": training.timetable.epochs_at(training.step),
        "schedule_percent": training.timetable.percent_at(training.step),
        "tokens_per_second": sum(result.num_tokens for result in seen) / max(seat.seconds, 1e-9),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
    }


def _written(content: CheckpointContent, folder: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    content.write(folder)
    return metrics


def _end_if_the_gpu_is_out_of_order() -> None:
    """End the process if no further call to the GPU can succeed: a new host takes its place, and trials come back."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        _log.exception("the GPU is out of order: this host ends")
        os._exit(1)


def _settle(reply: "Future[Any]", call: Callable[[], Any]) -> None:
    try:
        reply.set_result(call())
    except Exception as error:  # belongs to the caller
        reply.set_exception(error)
