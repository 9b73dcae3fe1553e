"""Owns how a trial that people ask for begins at once: another one is set aside, and gives it its seat.

Of the trials that run, the one with the worst score is asked to leave at its next step. It keeps where it
stands (tuning.host), is paused, and goes on exactly from there when a seat falls free. Loads nothing heavy.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ray.tune.experiment import Trial

from tuning.ledger import TrialRecord
from tuning.objective import score_of
from tuning.orders import SET_ASIDE, Order

_SECONDS_TO_FIND_A_SEAT, _SECONDS_BETWEEN_WISHES = 1.5, 1.0


class ClonesToCome(Protocol):
    """Whoever makes clones, such as tuning.ledger_search.LedgerSearch."""

    @property
    def sources(self) -> Mapping[str, str | None]:
        """Return the trial whose settings each clone began with, by the clone's id."""

    @property
    def upcoming_clone(self) -> tuple[str, Order] | None:
        """Return the name of the next order for a clone, and the order."""

    def next_clone(self) -> Any:
        """Return the next trial that people asked for; None if there is none."""


class CloneSeats:
    """Gives clones their seats, behind a scheduler of Ray's.

    `records`: of the trials that began before. `wish`: asks a trial, by its id, to leave its seat at its next
    step. `go_on_later`: has a trial of Ray's go on from where it stood between two reports. `most`: trials at
    once, whatever room there is.
    """

    def __init__(
        self,
        search: ClonesToCome,
        records: Sequence[TrialRecord],
        wish: Callable[[str], None],
        go_on_later: Callable[[Any], None],
        most: float = math.inf,
    ):
        self._search, self._wish, self._go_on_later, self._most = search, wish, go_on_later, most
        self._scores = {record.trial_id: score_of(record.curve[-1]) for record in records if record.curve}
        self._set_aside = set[str]()
        self._for: str | None = None  # whom there is to be room for, and the trial that is asked to leave
        self._victim: Any = None
        self._next_wish = 0.0

    def next(self, tune_controller: Any) -> Any:
        """Return the clone that is to begin next, and see to its seat; None if there is none."""
        rays, trials = _rays(tune_controller), tune_controller.get_trials()
        while (upcoming := self._search.upcoming_clone) is not None:
            if self.is_full(trials):
                name, order = upcoming
                self._make_room(name, order.trial_id, trials)
                break
            rays.add_trial(self._search.next_clone())
        for trial in trials if self._search.sources else ():
            if trial.status == Trial.PENDING and self.is_clone(trial):
                if not _has_process(rays, trial):
                    self._make_room(trial.trial_id, self._search.sources[trial.trial_id], trials)
                return trial
        return None

    def takes_seat(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> bool:
        """Tell whether a result says that its trial was set aside; if so, pause it.

        Its process goes to the next trial, the clone.
        """
        if SET_ASIDE not in result:
            self._scores[trial.trial_id] = score_of(result)
            self._set_aside.discard(trial.trial_id)
            return False
        if result[SET_ASIDE]:
            self._go_on_later(trial)
        self._set_aside.add(trial.trial_id)
        self._next_wish = time.monotonic() + _SECONDS_TO_FIND_A_SEAT  # this one's
        rays = _rays(tune_controller)
        reuses, rays._reuse_actors = rays._reuse_actors, True
        tune_controller.pause_trial(trial, should_checkpoint=False)
        rays._reuse_actors = reuses
        return True

    def is_clone(self, trial: Any) -> bool:
        """Tell whether a trial is a clone."""
        return trial.trial_id in self._search.sources

    def is_full(self, trials: Sequence[Any]) -> bool:
        """Tell whether as many of the trials as there may be have a seat, or wait for one."""
        return sum(trial.status in (Trial.RUNNING, Trial.PENDING) for trial in trials) >= self._most

    def paused(self, trials: Sequence[Any]) -> list[Any]:
        """Return those of the trials that were set aside, and wait for a seat."""
        return [trial for trial in trials if self.is_paused(trial)] if self._set_aside else []

    def is_paused(self, trial: Any) -> bool:
        """Tell whether a trial was set aside, and waits for a seat."""
        return trial.status == Trial.PAUSED and trial.trial_id in self._set_aside

    def _make_room(self, whom: str, source: str | None, trials: Sequence[Any]) -> None:
        """Ask a trial to leave, again and again: it may be on its way to another host."""
        now = time.monotonic()
        if self._for != whom:
            self._for, self._victim, self._next_wish = whom, None, now + _SECONDS_TO_FIND_A_SEAT
        if now < self._next_wish:
            return
        if self._victim is None or self._victim.status != Trial.RUNNING:
            self._victim = self._worst(trials, source)
        if self._victim is not None:
            self._wish(self._victim.trial_id)
        self._next_wish = now + _SECONDS_BETWEEN_WISHES

    def _worst(self, trials: Sequence[Any], source: str | None) -> Any:
        """Return the trial with the worst score of those that run, or the last one; no clone.

        The clone's source only if there is no other one.
        """
        running = [trial for trial in trials if trial.status == Trial.RUNNING and not self.is_clone(trial)]
        others = [trial for trial in running if trial.trial_id != source] or running
        known = [trial for trial in others if trial.trial_id in self._scores]
        worst = max(known, key=lambda trial: self._scores[trial.trial_id], default=None)
        return worst or (others[-1] if others else None)


def _rays(tune_controller: Any) -> Any:
    """Return Ray's controller itself, of which schedulers see a part."""
    return getattr(tune_controller, "_tune_controller", tune_controller)


def _has_process(rays: Any, trial: Any) -> bool:
    """Tell whether a trial has resources, so that its process starts or is there."""
    actor = rays._trial_to_actor.get(trial)
    return actor is not None and rays._actor_manager.is_actor_started(actor)
