"""Owns which trials of a sweep Ray Tune runs: those that its space draws, less those that have ended.

A sweep that goes on is drawn again from its seed, under the same ids, and its ledger tells of each trial
whether it has ended, has begun (then its checkpoints are handed to Ray), or is new. Ray's own saved state is
never read: it lags behind, it may be cut, and it is pickled, so that whoever could write to it could run code
here. The searcher behind is Ray's, random or Optuna's, or ours (tuning.prior_search).
"""

import math
import re
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, SearchGenerator

from qlora.checkpoint_files import CheckpointError
from tuning.checkpoints import STOPPED, Storage, put_start, restore_checkpoints
from tuning.ledger import TrialRecord
from tuning.objective import METRIC, score_of
from tuning.orders import Order, Orders
from tuning.prior_search import PriorSearcher
from tuning.space import Space
from tuning.strategy import Rounds

_PENDING_AT_ONCE = 200  # random trials that Ray knows of ahead, so that a cluster grows in time
_NO_SCORE = {"diverged", "unjudged"}  # keys of results of trials that failed
_DRAWN_AHEAD = {"random": _PENDING_AT_ONCE, "prior": 8, "optuna": 1}  # by who learns how much from a trial


class LedgerSearch(SearchAlgorithm):
    """A searcher of Ray's behind Ray's interface, which knows what a sweep has done before.

    `records`: of the trials that began before, in the order in which they did. `base_width`: hidden size of
    the base. `may_begin`: whether a new trial may, by its number. `orders`: what people ask for,
    if they may. `keep`: keeps the record of a clone, so that its number is its own from then on.
    clones: by trial, the name of an order and the order, of this sitting. sources: of all clones, the trial
    whose settings each began with. A clone is a trial beside what the searcher draws, which goes on as if
    there were none.
    """

    def __init__(
        self,
        space: Space,
        records: Sequence[TrialRecord],
        storage: Storage,
        base_width: int,
        may_begin: Callable[[int], bool] = lambda number: True,
        orders: Orders | None = None,
        keep: Callable[[TrialRecord], None] = lambda record: None,
    ):
        super().__init__()
        self._space, self._storage, self._inner = space, storage, _searcher(space, base_width)
        self._beside = BasicVariantGenerator(random_state=space.seed)  # trials of Ray's to be clones
        self._may_begin, self._orders, self._keep = may_begin, orders, keep
        self._taken = {record.order for record in records if record.order}
        self.clones, self.sources = dict[str, tuple[str, Order]](), dict[str, str | None]()
        self._held = deque[Any]()  # trials that have not begun, behind those that have
        self._untold = set[str]()  # trials whose results say nothing of their settings
        self._records = {record.trial_id: record for record in records}
        self._ids, self._to_come = TrialIds(space.seed, list(self._records)), set(self._records)
        self._inner_ids: dict[str, str] = {}
        self._kept_settings: dict[str, dict[str, Any]] = {}  # of trials that are drawn otherwise now
        self._settings_of_clones: dict[str, dict[str, Any]] = {}
        self._has_rounds = isinstance(space.scheduler, Rounds)
        self._limit, self._live = space.max_concurrent_trials or math.inf, set[str]()
        self._last_results: dict[str, dict[str, Any]] = {}
        self._is_over = False

    @property
    def max_pending(self) -> int:
        """Return how many trials Ray may know of before they start."""
        return _DRAWN_AHEAD[self._space.searcher.type]

    @property
    def metric(self) -> str | None:
        """Return what trials are compared by."""
        return self._inner.metric  # type: ignore[no-any-return]

    @property
    def total_samples(self) -> int:
        """Count the trials of the sweep."""
        return self._num_trials()

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Take over what trials are compared by, which way, and the space."""
        return self._inner.set_search_properties(metric, mode, config, **spec)  # type: ignore[no-any-return]

    def add_configurations(self, experiments: Any) -> None:
        """Take in the experiment that trials are drawn for."""
        self._inner.add_configurations(experiments)
        self._beside.add_configurations(experiments)

    def next_trial(self) -> Any:
        """Return the next trial that has not ended; None if there is none for now.

        Clones come first and, when a sweep goes on, those that had begun.
        """
        if not self._is_full() and (clone := self.next_clone()) is not None:
            return clone  # or a scheduler makes room for it (tuning.clone_seats)
        if self._held and not self._to_come:
            return self._held.popleft()
        while self._ids.count < len(self._records) or self._may_draw():
            record = self._records.get(self._ids.upcoming)
            is_clone = record is not None and record.order is not None
            source = self._beside if is_clone else self._inner
            if (not is_clone and self._is_full()) or (trial := source.next_trial()) is None:
                break
            drawn_as = trial.trial_id
            self._name(trial)
            if record is None:
                self._inner_ids[trial.trial_id] = drawn_as
                self._held.append(trial)
                if self._to_come:
                    continue
                break
            known = {key: record.config[key] for key in trial.config if key in record.config}
            if is_clone:
                self._take_clone(trial, known, record.cloned_from, self._is_warm(record))
            else:
                self._inner_ids[trial.trial_id] = drawn_as
                self._give_settings(trial, drawn_as, known)
            last = record.curve[-1] if record.curve and record.status != "diverged" else None
            ended = None if last is None else {METRIC: score_of(last), **last}
            for number, point in enumerate(record.curve):
                if not record.has_ended or point is not last:
                    told = {METRIC: score_of(point), **point, "training_iteration": number + 1}
                    self.on_trial_result(record.trial_id, told)
            if record.has_ended:
                self.on_trial_complete(record.trial_id, ended, error=ended is None)
                continue
            restore_checkpoints(trial, self._storage, record)
            return trial
        return self._held.popleft() if self._held else None

    @property
    def upcoming_clone(self) -> tuple[str, Order] | None:
        """Return the name of the next order for a clone that can be carried out, and the order."""
        orders = self._orders.clones if self._orders is not None else {}
        if self._is_over or self._to_come:
            return None
        return next(((name, order) for name, order in orders.items() if name not in self._taken), None)

    def next_clone(self) -> Any:
        """Return the next trial that people asked for with settings of their own; None if there is none."""
        if (upcoming := self.upcoming_clone) is None:
            return None
        (name, order), trial = upcoming, self._beside.next_trial()
        self._name(trial)
        self._taken.add(name)
        self.clones[trial.trial_id] = (name, order)
        self._take_clone(trial, dict(order.settings), order.trial_id, order.is_warm)
        start = f"{self._storage.path}/{trial.trial_id}/{STOPPED}"
        if self._storage.is_finished(start):
            self._storage.remove(start)  # of a warm clone that never began under this id
        if order.is_warm:
            with suppress(CheckpointError):  # that one's are damaged: this one begins afresh
                put_start(self._storage, str(order.trial_id), trial.trial_id)
                restore_checkpoints(trial, self._storage, TrialRecord(trial.trial_id, {}))
        config = self._space.trial_config(trial.config)
        self._keep(TrialRecord(trial.trial_id, config, cloned_from=order.trial_id, order=name))
        return trial

    def _name(self, trial: Any) -> None:
        trial.trial_id = trial.custom_dirname = self._ids.next()
        self._live.add(trial.trial_id)
        self._to_come.discard(trial.trial_id)

    def _take_clone(self, trial: Any, settings: dict[str, Any], source: str | None, is_warm: bool) -> None:
        """Let a trial be a clone of another; what it reports is learned from, unless it `is_warm`."""
        self.sources[trial.trial_id] = source
        trial.config = self._settings_of_clones[trial.trial_id] = settings
        if is_warm:
            self._untold.add(trial.trial_id)
        elif isinstance(learner := _learner(self._inner), PriorSearcher):
            learner.tried_instead(trial.trial_id, settings)

    def _give_settings(self, trial: Any, drawn_as: str, known: dict[str, Any]) -> None:
        """Let a trial that began before have the settings that it has had, whatever is drawn now."""
        if self._space.trial_config(trial.config) == self._space.trial_config(known):
            return
        trial.config = known
        if isinstance(learner := _learner(self._inner), PriorSearcher):
            learner.tried_instead(drawn_as, known)
        else:
            self._kept_settings[trial.trial_id] = known

    def _is_warm(self, record: TrialRecord) -> bool:
        """Tell whether a trial began with another one's adapter."""
        order = self._orders.clones.get(record.order or "") if self._orders is not None else None
        return order is not None and order.is_warm

    def _num_trials(self) -> int:
        return self._space.num_trials + (self._orders.added if self._orders is not None else 0)

    def _is_full(self) -> bool:
        """Tell whether as many trials are under way as may be; those of rounds wait for each other."""
        counted = self._live - self.sources.keys() if self._has_rounds else self._live
        return len(counted) >= self._limit

    def _may_draw(self) -> bool:
        return self._ids.count < self._num_trials() and self._may_begin(self._ids.count)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass a result on, unless it is no number to learn from."""
        if not math.isfinite(result.get(METRIC, math.nan)):
            return
        self._last_results[trial_id] = result
        learner = _learner(self._inner)
        if trial_id in self._settings_of_clones:
            if isinstance(learner, PriorSearcher) and trial_id not in self._untold:
                learner.on_trial_result(trial_id, result)
        elif trial_id not in self._kept_settings:
            self._inner.on_trial_result(self._inner_ids[trial_id], result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Pass on how a trial ended; one that diverged has failed.

        Ray tells no result of a trial that is stopped while it is paused: its last one counts.
        """
        self._live.discard(trial_id)
        has_failed = error or (result is not None and not _NO_SCORE.isdisjoint(result))
        if not has_failed and not (result and math.isfinite(result.get(METRIC, math.nan))):
            result = self._last_results.get(trial_id)  # it was paused, or had just come back from that
        if has_failed or not result or not math.isfinite(result.get(METRIC, math.nan)):
            result, error = None, True
        learner = _learner(self._inner)
        settings = self._settings_of_clones.get(trial_id) or self._kept_settings.get(trial_id)
        if settings is not None and result is not None and trial_id not in self._untold:
            if isinstance(learner, PriorSearcher):
                learner.on_trial_complete(trial_id, result)
            elif learner is not None:
                with suppress(ValueError):  # people may choose what lies outside of the space
                    learner.add_evaluated_point(settings, result[METRIC])
        if trial_id in self._kept_settings:
            result, error = None, True  # what was drawn for it was never tried
        if trial_id not in self._settings_of_clones:
            self._inner.on_trial_complete(self._inner_ids[trial_id], result=result, error=error)

    def is_finished(self) -> bool:
        """Tell whether no trial is left to draw."""
        are_drawn = self._ids.count >= max(self._num_trials(), len(self._records))
        return self._is_over or (not self._held and (are_drawn or self._inner.is_finished()))

    def set_finished(self) -> None:
        """Draw no more trials."""
        self._is_over = True
        self._inner.set_finished()

    def has_checkpoint(self, dirpath: str) -> bool:
        """Say that there is no state to read: the ledger is."""
        return False

    def save_to_dir(self, dirpath: str, **kwargs: Any) -> None:
        """Write nothing: the ledger is the state."""

    def restore_from_dir(self, dirpath: str) -> None:
        """Read nothing: the ledger is the state."""


class TrialIds:
    """The ids of a sweep's trials, in the order in which they are drawn: its seed and a number.

    `known`: those that began before. Sweeps from before have a prefix of their own, or ids without order.
    count: how many were drawn.
    """

    def __init__(self, seed: int, known: Sequence[str]):
        first = re.fullmatch(r"(.+)_\d{5}", known[0]) if known else None
        prefix = first[1] if first else str(seed)
        self._prefix, self.count = prefix, 0
        self._without_order = [
            trial_id for trial_id in known if not re.fullmatch(rf"{re.escape(prefix)}_\d{{5}}", trial_id)
        ]

    @property
    def upcoming(self) -> str:
        """Return the next id."""
        if self.count < len(self._without_order):
            return self._without_order[self.count]
        return f"{self._prefix}_{self.count:05d}"

    def next(self) -> str:
        """Take the next id."""
        upcoming = self.upcoming
        self.count += 1
        return upcoming


def _searcher(space: Space, base_width: int) -> Any:
    limit = space.max_concurrent_trials or 0
    if space.searcher.type == "random":
        return BasicVariantGenerator(random_state=space.seed, max_concurrent=limit)
    if space.searcher.type == "prior":
        learner: Any = PriorSearcher(space, base_width)
    else:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        learner = OptunaSearch(seed=space.seed)
    return SearchGenerator(ConcurrencyLimiter(learner, limit) if limit else learner)


def _learner(searcher: Any) -> Any:
    """Return the searcher that learns from results, within its wrappers; None if there is none."""
    inner = getattr(searcher, "searcher", None)
    return getattr(inner, "searcher", inner)
