"""A batch job's books: progress, time until the first rows, and what GPUs cost over all runs."""

import time

import pytest

from inference.books import Books, Progress
from qlora.cost import Cost


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """Time, which a test moves."""
    found = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: found[0])
    return found


def test_progress_counts_from_when_the_first_engine_was_ready(tmp_path, now):
    books = Books(tmp_path / "held.json", 10, None, resume=False)
    now[0] += 20  # engines load
    with books.engines_held(2, lambda: 0):
        now[0] += 4
        assert books.add(2, 50, seconds=4) == Progress(2, 50, 10, 4)
        now[0] += 4
        reached = books.add(5, 70, seconds=3)
        assert reached == Progress(5, 120, 10, 8) and reached.seconds_left == 8
        assert str(reached) == "5/10 rows, 0.62 rows/s, 15 tokens/s, 8 s left"
    account = books.close()
    assert (account.seconds, account.seconds_generating, account.first_row_seconds) == (28, 8, 24)
    figures = account.figures
    assert (figures["workers"], figures["tokens"], figures["rows_generated"]) == (2, 120, 10)
    assert figures["cost"] is None


def test_gpus_of_all_runs_are_paid_for(tmp_path, now):
    def run(*, resume: bool) -> Books:
        books = Books(tmp_path / "held.json", 4, 3600.0, resume=resume)
        with books.engines_held(2, lambda: 2):
            now[0] += 10
            reached = books.add(1, 7, seconds=5)
        assert reached.expected == Cost(books.close().costs.measured.gpu_seconds + 2 * 15, 3600.0)
        return books

    first = run(resume=False).close()
    assert first.costs.measured == Cost(20, 3600.0) and first.figures["cost"]["money"] == 20
    again = run(resume=True).close()
    assert again.costs.measured.gpu_seconds == 40 and again.costs.planned == first.costs.planned == Cost(
        50, 3600.0
    )
    assert run(resume=False).close().costs.measured.gpu_seconds == 20


def test_a_run_without_rows_tells_what_runs_before_cost(tmp_path, now):
    books = Books(tmp_path / "held.json", 1, None, resume=False)
    with books.engines_held(1, lambda: 1):
        now[0] += 6
        books.add(1, 7, seconds=5)
    account = Books(tmp_path / "held.json", 0, None, resume=True).close()
    assert account.first_row_seconds is None and account.seconds_generating == 0
    assert account.costs.measured.gpu_seconds == 6
