"""Owns the table of trials on the screen: redrawn in place on a terminal, printed now and then elsewhere."""

import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tuning.ledger import TrialRecord
from tuning.objective import Objective
from tuning.progress import headline, table

_SECONDS_BETWEEN_TABLES = 20.0
_SECONDS_BETWEEN_FRAMES = 1.0


class SweepScreen:
    """Shows the trials of a sweep of so many; `zero_shot`, `objective`: see `tuning.progress.table`."""

    def __init__(
        self, num_trials: int, zero_shot: float | Mapping[str, float], objective: Objective | None = None
    ):
        self._num_trials, self._zero_shot = num_trials, zero_shot
        self._objective = objective or Objective()
        self._notes: list[str] = []
        self._started_at = self._shown_at = time.monotonic()
        self._live = (
            Live(console=Console(file=sys.stdout), auto_refresh=False) if sys.stdout.isatty() else None
        )

    def note(self, notes: Sequence[str]) -> None:
        """Keep what people should know of how the work goes, each thing once, for the next table."""
        self._notes = list(dict.fromkeys([*self._notes, *notes]))

    def expect(self, num_trials: int) -> None:
        """Know of so many trials."""
        self._num_trials = num_trials

    def update(self, records: Sequence[TrialRecord]) -> None:
        """Show the trials if it is time to."""
        between = _SECONDS_BETWEEN_TABLES if self._live is None else _SECONDS_BETWEEN_FRAMES
        if time.monotonic() - self._shown_at > between:
            self._show(records)

    def close(self, records: Sequence[TrialRecord]) -> None:
        """Show the trials for the last time."""
        self._show(records)
        self.stop()

    def stop(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()

    def _show(self, records: Sequence[TrialRecord]) -> None:
        self._shown_at = time.monotonic()
        elapsed_seconds = self._shown_at - self._started_at
        trials = table(records, self._zero_shot, objective=self._objective)
        words = [headline(records, self._num_trials, elapsed_seconds, self._objective)]
        words += [f"note: {note}" for note in self._notes]
        if self._live is None:
            print("", trials, *words, sep="\n", flush=True)
            return
        if not self._live.is_started:
            self._live.start()
        lines = ["", *words, trials]  # what doesn't fit on a low terminal is cut at its end
        self._live.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"), refresh=True)
