"""Owns how a trial that people ask for begins at once: another one is set aside, and gives it its seat.

Of the trials that run, the one with the worst score is asked to leave at its next step. It keeps where it
stands (tuning.host), is paused, and goes on exactly from there when a seat falls free. Loads nothing heavy.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ray.tune.experiment import Trial

from tuning.ledger import TrialRecord
from tuning.objective import score_of
from tuning.orders import SET_ASIDE, Order

_SECONDS_TO_FIND_A_SEAT, _SECONDS_BETWEEN_WISHES = 1.5, 1.0


class ClonesToCome(Protocol):
    """Whoever makes clones of this sitting, such as tuning.ledger_search.LedgerSearch."""

    @property
    def clones(self) -> Mapping[str, tuple[str, Order]]:
        """Return the name of each clone's order and the order, by trial id."""

    def next_clone(self) -> Any:
        """Return the next trial that people asked for; None if there is none."""


class CloneSeats:
    """Gives clones their seats, behind a scheduler of Ray's.

    `records`: of the trials that began before. `wish`: asks a trial, by its id, to leave its seat at its next
    step. `go_on_later`: has a trial of Ray's go on from where it stood between two reports.
    """

    def __init__(
        self,
        search: ClonesToCome,
        records: Sequence[TrialRecord],
        wish: Callable[[str], None],
        go_on_later: Callable[[Any], None],
    ):
        self._search, self._wish, self._go_on_later = search, wish, go_on_later
        self._scores = {record.trial_id: score_of(record.curve[-1]) for record in records if record.curve}
        self._set_aside = set[str]()
        self._clone: str | None = None  # the one that waits, and the trial that is asked to leave
        self._victim: Any = None
        self._next_wish = 0.0

    def next(self, tune_controller: Any) -> Any:
        """Return the clone that is to begin next, and see to its seat; None if there is none."""
        rays = _rays(tune_controller)
        while (trial := self._search.next_clone()) is not None:
            rays.add_trial(trial)
        clones = self._search.clones
        trials = tune_controller.get_trials() if clones else ()
        for trial in trials:
            if trial.status == Trial.PENDING and trial.trial_id in clones:
                if not _has_process(rays, trial):
                    self._make_room(trial, trials)
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
        """Tell whether a trial is a clone that began in this sitting."""
        return trial.trial_id in self._search.clones

    def paused(self, tune_controller: Any) -> list[Any]:
        """Return the trials that were set aside, and wait for a seat."""
        if not self._set_aside:
            return []
        return [trial for trial in tune_controller.get_trials() if self.is_paused(trial)]

    def is_paused(self, trial: Any) -> bool:
        """Tell whether a trial was set aside, and waits for a seat."""
        return trial.status == Trial.PAUSED and trial.trial_id in self._set_aside

    def _make_room(self, clone: Any, trials: Sequence[Any]) -> None:
        """Ask a trial to leave, again and again: it may be on its way to another host."""
        now = time.monotonic()
        if self._clone != clone.trial_id:
            self._clone, self._victim, self._next_wish = clone.trial_id, None, now + _SECONDS_TO_FIND_A_SEAT
        if now < self._next_wish:
            return
        if self._victim is None or self._victim.status != Trial.RUNNING:
            self._victim = self._worst(trials, self._search.clones[clone.trial_id][1].trial_id)
        if self._victim is not None:
            self._wish(self._victim.trial_id)
        self._next_wish = now + _SECONDS_BETWEEN_WISHES

    def _worst(self, trials: Sequence[Any], source: str | None) -> Any:
        """Return the trial with the worst score of those that run, or the last one; no clone.

        The clone's source only if there is no other one.
        """
        running = [
            trial
            for trial in trials
            if trial.status == Trial.RUNNING and trial.trial_id not in self._search.clones
        ]
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
