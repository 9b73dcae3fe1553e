"""The searcher that knows where good settings are expected: what it draws, and what it learns."""

import math

import pytest
from ray.tune.experiment import Experiment

from qlora.config import TrialSettings, parse_stages
from tuning.checkpoints import Storage
from tuning.ledger import TrialRecord
from tuning.ledger_search import LedgerSearch
from tuning.objective import METRIC
from tuning.prior_search import PriorSearcher
from tuning.space import Space, load_space, tune_space

STOPPED = ["scheduler={type: asha}", 'search.epochs={choice: [1, 2, 3, "1+1", "1+1+3"]}']
WIDE = load_space("search_spaces/wide.yaml", ["num_samples=24", *STOPPED])
EXPECTED = math.log(16 / 576)


def log_size(config: dict) -> float:
    return math.log(config["learning_rate"] * config["lora_alpha"] ** (2 / 3))


def drawn(searcher: PriorSearcher, count: int) -> list[dict]:
    return [searcher.suggest(f"t{number}") for number in range(count)]


def test_draws_are_around_the_expected_size_and_favour_long_schedules():
    configs = drawn(PriorSearcher(WIDE, base_width=576), 200)
    sizes = sorted(log_size(config) for config in configs)
    assert abs(sizes[100] - EXPECTED) < 0.5  # the range has more room below
    assert sizes[20] > EXPECTED - 2.5 and sizes[-20] < EXPECTED + 1.5
    epochs = [sum(parse_stages(config["epochs"])) for config in configs]
    assert sum(epochs) / 200 > 3  # 2.6 in the space


def test_where_none_is_stopped_epochs_take_turns():
    space = load_space("search_spaces/wide.yaml", ['search.epochs={choice: [2, "1+1+1", "1+1+3"]}'])
    for num_trials in (3, 8):
        epochs = [config["epochs"] for config in drawn(PriorSearcher(space, base_width=576), num_trials)]
        counts = [epochs.count(choice) for choice in space.values("epochs")]
        assert sum(counts) == num_trials and max(counts) - min(counts) <= 1


def test_a_wider_base_gets_lower_rates():
    medians = []
    for width in (576, 4096):
        rates = sorted(
            config["learning_rate"] for config in drawn(PriorSearcher(WIDE, base_width=width), 100)
        )
        medians.append(rates[50])
    assert 3 < medians[0] / medians[1] < 15


def test_every_draw_is_one_of_the_space():
    space = load_space(
        "search_spaces/wide.yaml",
        ["search.learning_rate={loguniform: [1.0e-6, 2.0e-6]}", "search.lora_alpha={choice: [8]}", *STOPPED],
    )
    for config in drawn(PriorSearcher(space, base_width=576), 50):
        assert 1e-6 <= config["learning_rate"] <= 2e-6 and config["lora_alpha"] == 8
        assert isinstance(space.trial_settings(config), TrialSettings)


def test_a_space_without_rates_can_be_searched():
    space = Space.model_validate(
        {"data": {"train": "a.json", "public": "b.json"}, "search": {"lora_dropout": {"uniform": [0, 0.2]}}}
    )
    assert len({config["lora_dropout"] for config in drawn(PriorSearcher(space, base_width=64), 10)}) == 10


def test_draws_move_to_the_best_trial_once_some_are_whole():
    searcher = PriorSearcher(WIDE, base_width=576)
    first = drawn(searcher, 40)
    far = max(range(40), key=lambda number: abs(log_size(first[number]) - EXPECTED))
    for number in range(40):
        value = 5.0 if number == far else 50.0
        percent = 100.0 if number % 5 == 0 else 10.0
        searcher.on_trial_result(f"t{number}", {METRIC: value, "schedule_percent": percent})
    later = [searcher.suggest(f"later{number}") for number in range(100)]
    middle = sorted(log_size(config) for config in later)[50]
    assert abs(middle - log_size(first[far])) < abs(middle - EXPECTED)


def opened(folder, records: list[TrialRecord], space: Space = WIDE) -> LedgerSearch:
    search = LedgerSearch(space, records, Storage.at(str(folder)), base_width=576)
    search.set_search_properties(METRIC, "min", tune_space(space))
    settings = {"config": tune_space(space), "num_samples": 24, "storage_path": str(folder)}
    search.add_configurations(Experiment("ray", lambda config: None, **settings))
    return search


def perplexity(config: dict) -> float:
    return 10 + abs(log_size(config) + 5)


def run_on(search: LedgerSearch) -> dict[str, dict]:
    """Each trial that is left, with two reports, ended before the next is drawn."""
    found = {}
    while not search.is_finished() and (trial := search.next_trial()) is not None:
        found[trial.trial_id] = dict(trial.config)
        for step, share in ((1, 1.5), (2, 1.0)):
            result = {METRIC: share * perplexity(trial.config), "schedule_percent": 50.0 * step, "step": step}
            search.on_trial_result(trial.trial_id, result)
        search.on_trial_complete(trial.trial_id, result)
    return found


@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.parametrize("done", [1, 9, 23])
def test_a_sweep_that_goes_on_draws_what_it_would_have_drawn(done, stopped, tmp_path):
    space = WIDE if stopped else load_space("search_spaces/wide.yaml", ["num_samples=24"])
    undisturbed = run_on(opened(tmp_path, [], space))
    assert len(undisturbed) == 24
    records = []
    for trial_id, config in list(undisturbed.items())[:done]:
        curve = tuple(
            {"step": step, "schedule_percent": 50.0 * step, METRIC: share * perplexity(config)}
            for step, share in ((1, 1.5), (2, 1.0))
        )
        settings = space.trial_settings(config).model_dump(mode="json")
        records.append(TrialRecord(trial_id, settings, "finished", curve))
    assert run_on(opened(tmp_path, records, space)) == dict(list(undisturbed.items())[done:])


def test_what_a_trial_had_in_another_process_is_what_is_learned_from(tmp_path):
    """Two processes knew other results when they drew; the ledger's configuration counts."""
    known = {"learning_rate": 1e-5, "lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "epochs": 3}
    settings = WIDE.trial_settings(known).model_dump(mode="json")
    point = {"step": 2, "schedule_percent": 100.0, METRIC: 1.0}
    records = [TrialRecord(f"42_{number:05d}", settings, "finished", (point,)) for number in range(12)]
    found = run_on(opened(tmp_path, records))
    sizes = sorted(log_size(config) for config in found.values())
    assert sizes[len(sizes) // 2] < EXPECTED - 2


def test_a_grid_is_refused():
    with pytest.raises(ValueError, match="searcher prior takes no grid_search"):
        load_space("search_spaces/wide.yaml", ["searcher={type: prior}", "search.lora_r={grid_search: [8]}"])
