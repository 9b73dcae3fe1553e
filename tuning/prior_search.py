"""Owns a searcher that knows where good settings are expected, and moves to the best that it has seen.

What decides how well a LoRA trains is the size of its update, u = learning rate x alpha^(2/3), far more than
rate, alpha and rank by themselves; the best u falls with the base's width. The exponent, the place and the
weight of epochs are fits to one half of the search table (benchmarks/search_table), whose base is 576 wide;
the fall with width reaches from there to the rates that others recommend for bases that are 4096 wide:
https://tinker-docs.thinkingmachines.ai/cookbook/api-reference/hyperparam_utils/get_lr
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from tuning.objective import METRIC
from tuning.space import Space, tune_space
from tuning.strategy import EPOCHS_POWER, NoEarlyStopping

_BEST_SIZE = 16.0  # expected of learning rate x alpha^(2/3), times the base's width
_ALPHA_POWER = 2 / 3
_SPREAD = 0.5  # standard deviation of the size's logarithm
_PLAIN_DRAWS = 0.1  # share of draws that follow the space's samplers alone
_CANDIDATES = 32  # draws of the space among which one is chosen
_PATIENCE = 2  # trials that are whole after which the best weighs as much as the expectation


class PriorSearcher(Searcher):
    """Draws from the space's own samplers, weighted by where good settings are expected.

    A draw is one of several plain ones, chosen with weights that are normal in the logarithm of the update's
    size. Their centre moves from the expected size to that of the best trial so far, rungs counted like ends.
    Where no trial is stopped early, a choice of epochs is taken in turn, so that each has its trials.
    `base_width`: hidden size of the base. Draws depend on the seed, their number and the results before them.
    """

    def __init__(self, space: Space, base_width: int):
        super().__init__(METRIC, "min")
        self._space, self._domains = space, tune_space(space)
        self._expected = math.log(_BEST_SIZE / base_width)
        self._turns = _choices_in_turn(space, "epochs")
        self._drawn = dict[str, Mapping[str, Any]]()
        self._lowest = dict[str, float]()  # perplexity of each trial
        self._whole = set[str]()  # trials that did their whole schedule
        self._count = 0

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Agree to search the space that it has."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Draw the next configuration."""
        random = np.random.default_rng((self._space.seed, self._count))
        turn = {key: choices[self._count % len(choices)] for key, choices in self._turns.items()}
        self._count += 1
        candidates = [
            {key: domain.sample(random_state=random) for key, domain in self._domains.items()} | turn
            for _ in range(_CANDIDATES)
        ]
        place = 0
        if random.random() >= _PLAIN_DRAWS:
            weights = np.array([self._log_weight(candidate) for candidate in candidates])
            chances = np.exp(weights - weights.max())
            place = int(random.choice(_CANDIDATES, p=chances / chances.sum()))
        self._drawn[trial_id] = candidates[place]
        return dict(candidates[place])

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Learn from an evaluation."""
        self._lowest[trial_id] = min(result[METRIC], self._lowest.get(trial_id, math.inf))
        if result["schedule_percent"] >= 100:
            self._whole.add(trial_id)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Learn from a trial's last evaluation, if it is told."""
        if result and not error:
            self.on_trial_result(trial_id, result)

    def tried_instead(self, trial_id: str, config: Mapping[str, Any]) -> None:
        """Take in what a trial has that began in another process, where other results were known."""
        self._drawn[trial_id] = config

    def _log_weight(self, config: Mapping[str, Any]) -> float:
        epochs = sum(self._space.trial_settings(dict(config)).stages)
        off = (self._log_size(config) - self._centre()) / _SPREAD
        return EPOCHS_POWER * math.log(epochs) - off**2 / 2

    def _centre(self) -> float:
        """Return around which logarithm of a size to draw."""
        if not self._lowest:
            return self._expected
        best = min(self._lowest, key=lambda trial_id: self._lowest[trial_id])
        share = len(self._whole) / (len(self._whole) + _PATIENCE)
        return self._expected + share * (self._log_size(self._drawn[best]) - self._expected)

    def _log_size(self, config: Mapping[str, Any]) -> float:
        settings = self._space.trial_settings(dict(config))
        return math.log(settings.learning_rate) + _ALPHA_POWER * math.log(settings.lora_alpha)


def _choices_in_turn(space: Space, key: str) -> dict[str, list[Any]]:
    """Return the choices of a setting by its key; empty where it has none, or weak trials are stopped."""
    choices = space.search.get(key, {}).get("choice")
    return {key: choices} if choices and isinstance(space.scheduler, NoEarlyStopping) else {}
