"""What a sweep says of itself while it runs: how far it is, and how long it may still take."""

import pytest

from tuning.ledger import TrialRecord
from tuning.progress import headline


def record(name: str, epochs, percent: float, status: str) -> TrialRecord:
    """A trial that is so far in its schedule."""
    point = {"step": 1.0, "epoch": 1.0, "schedule_percent": percent, "public_perplexity": 5.0}
    return TrialRecord(name, {"epochs": epochs, "learning_rate": 1e-3}, status, (point,) if percent else ())


@pytest.mark.parametrize(
    ("records", "num_trials", "left"),
    [
        ([record("a", "1+1+1", 100, "finished"), record("b", "1+1+3", 40, "running")], 4, "1:50"),
        ([record("a", "1+1+1", 100, "finished"), record("b", "1+1+3", 40, "stopped")], 2, "0:00"),
        ([record("a", 2, 50, "running"), record("b", 6, 0, "pending")], 2, "5:50"),
        ([record("a", 2, 0, "running")], 2, "?"),
    ],
)
def test_what_is_left_is_counted_in_epochs(records, num_trials, left):
    """A long schedule has more of them than a short one; trials to come are like those that are known."""
    assert f"elapsed 0:50, at most {left} left" in headline(records, num_trials, 50.0)
