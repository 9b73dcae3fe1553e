"""Owns a host's seats and turns: which trials are attached to its device, and what each was asked to reach.

One thread does everything that touches the device: whoever calls leaves a request and waits. Between two
steps the thread carries out what was asked for; a trial that asks for nothing (it waits at a rung, or was
stopped) costs the others nothing. Checkpoints are written by threads of their own; where a GPU would have
nothing to do meanwhile, trials train on before they are asked to, and if they are not, that is forgotten.
Refuses to know how work is done (tuning.shared_work), how hosts are found and how trials report.
"""

import json
import math
import threading
from collections.abc import Sequence
from concurrent import futures
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from qlora.base.device import default_device
from qlora.checkpoint import CheckpointContent, load_checkpoint
from qlora.checkpoint_files import SINCE_REPORT
from qlora.config import TrialSettings
from qlora.data.prompts import EncodedExample
from qlora.lora.average import read_update
from qlora.lora.peft_folder import AdapterFiles
from qlora.perplexity import mean_perplexity
from qlora.provenance import hardware
from qlora.training import StepResult, Training
from tuning.calls import Calls, settle
from tuning.checkpoints import Storage
from tuning.evaluation_steps import evaluation_steps
from tuning.examples import PromptedExamples
from tuning.objective import JudgingStoppedError
from tuning.orders import SET_ASIDE
from tuning.seat import Seat, Standing, Writers, answered, point_of
from tuning.shared_work import SharedWork, TrialWork
from tuning.soup import Finalist, Soup, find_soup
from tuning.sweep_data import SweepData

_Answer = TypeVar("_Answer")
_MOST_STEPS_TO_WAIT = {"cpu": 0, "cuda": 24}  # for others, to have texts written together
_GOES_AHEAD = {"cpu": False, "cuda": True}  # a CPU has others' work to do meanwhile


class Host:
    """Trains attached trials in shared passes.

    Its methods may be called from many threads and block until done.
    """

    def __init__(self, data: SweepData, num_threads: int):
        torch.set_num_threads(num_threads)
        self._data = data
        self._seats: dict[str, Seat] = {}
        self._stopped, self._ended_by_hand = False, set[str]()
        self._steps_waited, self._most_steps_to_wait = 0, _MOST_STEPS_TO_WAIT[default_device().type]
        self._goes_ahead = _GOES_AHEAD[default_device().type]
        self._calls, self._is_over = Calls(), threading.Event()
        self._leaving: list[Future[Any]] = []  # replies to trials whose places are being kept
        budget, recomputes = data.for_device(hardware(default_device().type))
        self._work = SharedWork(data.space.base_model, budget, recomputes=recomputes)
        self._writers = Writers()
        threading.Thread(target=self._take_turns, daemon=True).start()

    def zero_shot(self) -> dict[str, list[float]]:
        """Measure the perplexity of each public example under the base alone, by prompt."""
        prompts = self._data.examples.by_prompt
        measured = self._calls.ask(
            lambda: self._work.evaluate([(None, one.public) for one in prompts.values()])
        )
        return dict(zip(prompts, map(_good, measured), strict=True))

    def evaluation_seconds(self, examples: Sequence[EncodedExample]) -> float:
        """Measure how long it takes to measure examples; on a GPU something like it has to come before."""
        return self._calls.ask(lambda: self._work.evaluation_seconds(examples))

    def zero_shot_values(self) -> dict[str, float]:
        """Measure the objective of texts under the base alone, by prompt."""
        prompts, judge = self._data.examples.by_prompt, self._data.judge
        assert judge is not None, "asked for an objective of texts only"
        requests = [(None, one) for one in prompts.values()]
        measured = self._calls.ask(lambda: self._work.judge(judge, requests, self._is_over.is_set))
        return dict(zip(prompts, map(_good, measured), strict=True))

    def attach(
        self,
        trial_id: str,
        holder: str,
        config: dict[str, Any],
        checkpoint: str | None = None,
        notes: Sequence[str] = (),
    ) -> list[int]:
        """Give a trial a seat, at the checkpoint in a folder if one is given.

        Returns the steps at which it is yet to be evaluated. A holder has one seat: what it held before is
        given up. `notes`: what people should know of how that checkpoint was found.
        """
        for note in notes:
            self._work.note(note)
        settings = self._data.space.trial_settings(config)
        weights = self._work.bank.fresh_weights(settings)  # here, where no other trial waits for it
        examples = self._data.examples.of(config)
        return self._calls.ask(
            lambda: self._attach(trial_id, holder, settings, examples, weights, checkpoint)
        )

    def advance(self, trial_id: str, step: int, folder: str) -> dict[str, Any]:
        """Train a trial up to a step, evaluate it, write a checkpoint into the folder.

        Returns its metrics, and as `perplexities` those of the public examples; for a trial that is to end,
        nothing but `by_hand`, for one that is to be set aside, `set_aside`: whether that was between two
        reports. Raises DivergedError; KeyError for a trial without a seat.
        """

        def start() -> "Future[dict[str, Any]]":
            seat = self._seats[trial_id]
            if trial_id in self._ended_by_hand:
                return answered({"by_hand": True})
            if seat.is_to_leave:
                return answered({SET_ASIDE: False})
            return seat.ask(step, folder)

        return self._calls.ask(start).result()

    def soup(
        self, storage: Storage, found: Sequence[Finalist], most: int
    ) -> tuple[Soup, AdapterFiles | None]:
        """Average finalists' adapters; see tuning.soup.find_soup."""

        def find() -> tuple[Soup, AdapterFiles | None]:
            with self._work.counted("evaluating"):
                public = self._data.examples.by_prompt[found[0].prompt].public
                return find_soup(self._work, public, storage, found, most)

        self._calls.ask(self._leave_all)
        return self._calls.ask(find)

    def measure(self, requests: Sequence[tuple[AdapterFiles, Sequence[EncodedExample]]]) -> list[list[float]]:
        """Measure the perplexity of examples under adapters. Raises what measuring raises."""

        def measured() -> list[list[float]]:
            found = []
            with self._work.counted("evaluating"):
                for adapter, examples in requests:
                    with adapter.in_folder() as folder:
                        update = read_update(folder)
                    found.append(self._work.perplexities(update, examples))
            return found

        self._calls.ask(self._leave_all)
        return self._calls.ask(measured)

    def end(self, trial_id: str) -> None:
        """Let a trial end at its next step, here if it is here, or when it comes."""

        def answer() -> None:
            self._ended_by_hand.add(trial_id)
            if trial_id in self._seats:
                self._seats[trial_id].answer({"by_hand": True})

        self._calls.leave(answer)

    def set_aside(self, trial_id: str, storage: Storage) -> None:
        """Let a trial that has a seat leave it at its next step; it goes on from TRIAL/checkpoint_stopped."""

        def leave() -> None:
            seat = self._seats.get(trial_id)
            if seat is not None and seat.is_between_reports:
                standing, reply = Standing.of(seat.work), seat.leave()
                self._leaving = [one for one in self._leaving if not one.done()] + [reply]
                self._writers.submit(reply, partial(standing.set_aside, storage, trial_id))
            elif seat is not None:
                seat.is_to_leave = seat.goal is None  # or it is answered at once
                seat.answer({SET_ASIDE: False})

        self._calls.leave(leave)

    def stop(self, storage: Storage) -> int:
        """Do no more work, and keep where each trial stands that is not at a report; returns how many are.

        They are put into the storage as TRIAL/checkpoint_stopped.
        """
        self._is_over.set()
        return self._calls.ask(lambda: self._stop(storage))

    def detach(self, trial_id: str, holder: str | None = None) -> None:
        """Take a trial's seat and memory back, if it has one; with a holder, only if that holds it still."""

        def leave() -> None:
            seat = self._seats.get(trial_id)
            if seat is not None and holder in (None, seat.holder):
                self._leave(trial_id)

        self._calls.ask(leave)

    def seconds(self) -> dict[str, float]:
        """Return where time went since the first trial came, by kind of work (tuning.shared_work.WORK)."""
        return dict(self._work.seconds)

    def notes(self) -> list[str]:
        """Return what people should know of how the work went."""
        return list(self._work.notes)

    def _take_turns(self) -> None:
        while True:
            try:
                self._turn()
            except Exception as error:  # this thread outlives anything, or every later call would hang
                for seat in self._seats.values():
                    seat.fail(error.with_traceback(None))

    def _turn(self) -> None:
        """Wait for work, then do one round of it.

        A method of its own: what it holds of trials goes when it ends.
        """
        with self._work.counted("waiting" if self._seats else None):
            for call, reply in self._calls.take(self._asked):
                settle(reply, call)
        asked = self._asked()
        on_the_way = [seat for seat in asked if not seat.at_goal]
        if there := [seat for seat in asked if seat.at_goal]:
            left = self._most_steps_to_wait - self._steps_waited
            waits = self._data.judge is not None and any(0 < seat.steps_to_go <= left for seat in asked)
            self._steps_waited = self._steps_waited + 1 if waits else 0
            if not waits:
                self._evaluate(there)
        if on_the_way:
            with self._work.counted("training"):
                self._train(on_the_way)

    def _asked(self) -> list[Seat]:
        """Return the trials that are asked to go on; if none is, those that are about to be."""
        there = [] if self._stopped else list(self._seats.values())
        asked = [seat for seat in there if seat.goal is not None]
        return asked or [seat for seat in there if seat.goes_ahead]

    def _train(self, seats: Sequence[Seat]) -> None:
        errors = self._work.train([seat.work for seat in seats])
        for seat, error in zip(seats, errors, strict=True):
            if error is not None:
                seat.fail(error)

    def _evaluate(self, seats: Sequence[Seat]) -> None:
        requests = [(seat.work.training.adapter, seat.examples.public) for seat in seats]
        measured = list[tuple[Seat, list[float]]]()
        with self._work.counted("evaluating"):
            answers = self._work.evaluate(requests)
        for seat, found in zip(seats, answers, strict=True):
            if isinstance(found, Exception):
                seat.fail(found)
            elif not math.isfinite(mean_perplexity(found)):
                seat.fail(seat.diverged(mean_perplexity(found)))
            else:
                measured.append((seat, found))
        for (seat, found), value in zip(measured, self._values(measured), strict=True):
            with self._work.counted("evaluating"):
                self._report(seat, found, value)

    def _report(self, seat: Seat, found: list[float], value: float | Exception) -> None:
        """Answer whoever asked for an evaluation, once a checkpoint is written."""
        try:
            value = _good(value)
            content = CheckpointContent.held(seat.work.training)
            metrics = point_of(seat.work, mean_perplexity(found), self._data.space.objective, value)
            metrics |= {"perplexities": found, "host_notes": self.notes()}
            self._writers.submit_report(seat.reply, content, Path(seat.folder), metrics)
        except JudgingStoppedError:
            return  # it is kept as it stands
        except Exception as error:  # memory may be short for the copy: that is this trial's failure
            seat.fail(error.with_traceback(None))
        else:
            seat.reported(goes_ahead=self._goes_ahead)

    def _values(self, measured: Sequence[tuple[Seat, list[float]]]) -> Sequence[float | Exception]:
        """Return the objective's value of each trial, or what judging its texts failed with."""
        if self._data.judge is None:
            return [mean_perplexity(found) for _, found in measured]
        requests = [(seat.work.training.adapter, seat.examples) for seat, _ in measured]
        with self._work.counted("writing texts"):
            return self._work.judge(self._data.judge, requests, self._is_over.is_set) if requests else []

    def _stop(self, storage: Storage) -> int:
        self._stopped = True
        futures.wait(self._leaving)
        standing = {name: seat.work for name, seat in self._seats.items() if seat.is_between_reports}
        for trial_id, work in standing.items():
            Standing.of(work).put(storage, trial_id)
        return len(standing)

    def _attach(
        self,
        trial_id: str,
        holder: str,
        settings: TrialSettings,
        examples: PromptedExamples,
        weights: torch.Tensor,
        checkpoint: str | None,
    ) -> list[int]:
        for other in [
            name for name, seat in self._seats.items() if seat.holder == holder or name == trial_id
        ]:
            self._leave(other)
        training = Training(self._work.bank, examples.train, settings, weights)
        if self._data.start is not None:
            with self._data.start.in_folder() as folder:
                self._work.bank.load(training.adapter, folder)
        work = TrialWork(training)
        if checkpoint is not None:
            load_checkpoint(Path(checkpoint), training)
            since = Path(checkpoint) / SINCE_REPORT
            if since.exists():
                found = json.loads(since.read_text(encoding="utf-8"))
                work.seconds, work.seen = found["seconds"], [StepResult(**step) for step in found["steps"]]
        stops = sorted(
            evaluation_steps(training.timetable, self._data.space.scheduler, settings.evaluations_per_epoch)
        )
        self._seats[trial_id] = Seat(holder, work, examples, stops)
        begin = training.step if work.seen else training.step + 1  # stopped just before its evaluation
        return [step for step in stops if step >= begin]

    def _leave_all(self) -> None:
        """Free what is left of trials, which have ended: their processes may have had no time to leave."""
        for trial_id in list(self._seats):
            self._leave(trial_id)

    def _leave(self, trial_id: str) -> None:
        seat = self._seats.pop(trial_id, None)
        if seat is not None:
            self._work.bank.detach(seat.work.training.adapter)
            seat.fail(RuntimeError("the trial was detached"))


def _good(found: _Answer | Exception) -> _Answer:
    """Return what was measured. Raises what that failed with."""
    if isinstance(found, Exception):
        raise found
    return found
