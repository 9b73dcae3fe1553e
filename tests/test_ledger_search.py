"""Which trials a sweep draws, through the interface that Ray Tune calls: Optuna's own draws, also after a
stop.
"""

import optuna
import pytest
from ray.tune.experiment import Experiment

from tuning.checkpoints import Storage
from tuning.ledger import TrialRecord
from tuning.ledger_search import LedgerSearch
from tuning.objective import METRIC
from tuning.space import load_space, tune_space

NUM_TRIALS, BOUNDS = 14, (1e-4, 3e-2)  # Optuna's sampler learns from the eleventh on
RATES = f"search={{learning_rate: {{uniform: [{BOUNDS[0]}, {BOUNDS[1]}]}}}}"
SPACE = load_space(
    "search_spaces/quickstart.yaml", ["searcher.type=optuna", f"num_samples={NUM_TRIALS}", RATES]
)


def perplexity(rate: float) -> float:
    return 10 + abs(rate - 1e-2) * 1000


def opened(folder, records: list[TrialRecord]) -> LedgerSearch:
    """A searcher that Ray Tune has set up, over what a sweep did before."""
    search = LedgerSearch(SPACE, records, Storage.at(str(folder)), base_width=64)
    search.set_search_properties(METRIC, "min", tune_space(SPACE))
    settings = {"config": tune_space(SPACE), "num_samples": NUM_TRIALS, "storage_path": str(folder)}
    search.add_configurations(Experiment("ray", lambda config: None, **settings))
    return search


def draw(search: LedgerSearch) -> dict[str, float]:
    """Each trial that is left, by its id, told of its end before the next is drawn."""
    found = {}
    while not search.is_finished() and (trial := search.next_trial()) is not None:
        found[trial.trial_id] = trial.config["learning_rate"]
        search.on_trial_complete(trial.trial_id, {METRIC: perplexity(found[trial.trial_id])})
    return found


def ended(trial_id: str, rate: float) -> TrialRecord:
    point = {"step": 1, "epoch": 1.0, "schedule_percent": 100.0, METRIC: perplexity(rate)}
    return TrialRecord(trial_id, {"learning_rate": rate}, "finished", (point,))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return draw(opened(tmp_path_factory.mktemp("undisturbed"), []))


def test_optuna_draws_what_it_would_draw_alone(undisturbed):
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=SPACE.seed))
    space = {"learning_rate": optuna.distributions.FloatDistribution(*BOUNDS)}
    alone = []
    for _ in range(NUM_TRIALS):
        trial = study.ask(space)
        alone.append(trial.params["learning_rate"])
        study.tell(trial, perplexity(alone[-1]))
    assert list(undisturbed.values()) == alone
    assert list(undisturbed) == [f"{SPACE.seed}_{number:05d}" for number in range(NUM_TRIALS)]


@pytest.mark.parametrize("done", [1, 10, 13, 14])
def test_a_sweep_that_goes_on_draws_what_it_would_have_drawn(done, undisturbed, tmp_path):
    before = list(undisturbed.items())[:done]
    found = draw(opened(tmp_path, [ended(trial_id, rate) for trial_id, rate in before]))
    assert found == dict(list(undisturbed.items())[done:])
