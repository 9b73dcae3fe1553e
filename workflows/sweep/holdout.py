"""Owns what is measured on the holdout: once, for the best adapter and its runner-up.

Nothing is chosen by it. What was measured is kept in the sweep's folder, with what tells the adapters.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from pydantic import TypeAdapter, ValidationError

from qlora.checkpoint_files import ADAPTER, CheckpointError
from qlora.config import InputError, first_line
from qlora.files import below, read_json, write_json
from qlora.lora.peft_folder import AdapterFiles
from reporting.intervals import Interval, bootstrap_interval, compare
from reporting.verdicts import HoldoutReport
from tuning.best_adapter import BestAdapter
from tuning.checkpoints import RAY, Storage, best_checkpoint
from tuning.host_directory import Hosts
from tuning.ledger import Ledger, TrialRecord, ranked
from workflows.session import StoppedError
from workflows.sweep.best import answer_of
from workflows.sweep.folder import SweepFolder
from workflows.sweep.prepared import PreparedSweep

_FILE = "holdout.json"


@dataclass(frozen=True)
class Holdout:
    """The perplexity of each example of the holdout under the best adapter and under its runner-up.

    digests: of the best adapter and of the examples. runner_up: a trial; None if there is no other. There are
    no perplexities of it if its checkpoint was damaged.
    """

    digests: tuple[str, str]
    best: tuple[float, ...]
    runner_up: str | None
    perplexities: tuple[float, ...]

    def report(self, words: str) -> HoldoutReport:
        """Return what the page says of it. `words`: what the examples hold."""
        name = self.runner_up if self.runner_up is not None and self.perplexities else ""
        return HoldoutReport(words, self.best, name, self.perplexities)

    def metrics(self) -> dict[str, float]:
        """Return what is measured of it on the sweep's run."""
        return {"holdout_perplexity": _figures(self.best)["perplexity"]}

    def words(self) -> str:
        """Say what the best adapter has, for the screen."""
        figures = _figures(self.best)
        return (
            Interval(figures["perplexity"], *figures["interval"]).words() + f" on {len(self.best)} examples"
        )

    def facts(self) -> dict[str, str]:
        """Return what a version's tags say of it."""
        figures = _figures(self.best)
        low, high = figures["interval"]
        return {
            "holdout_perplexity": repr(figures["perplexity"]),
            "holdout_interval": f"{low:.5g} to {high:.5g}",
            "holdout_digest": self.digests[-1],
        }

    def summary(self) -> dict[str, Any]:
        """Return what summary.json says of it."""
        found = {"count": len(self.best), **_figures(self.best)}
        if not self.perplexities:
            return found
        difference, low, high = compare(self.best, self.perplexities)
        return {
            **found,
            "runner_up": {"trial_id": self.runner_up, **_figures(self.perplexities)},
            "difference": {"mean": difference, "interval": [low, high]},
        }


_HOLDOUT = TypeAdapter(Holdout)


def measure_holdout(
    sweep: SweepFolder, prepared: PreparedSweep, hosts: Hosts, best: BestAdapter
) -> Holdout | None:
    """Measure the holdout, if there is one and it was not done. Raises StoppedError if it can't be."""
    if not prepared.has_holdout:
        return None
    examples = prepared.examples
    requests = [(AdapterFiles.read(best.folder), examples.of(best.record.config).holdout)]
    runner_up = _runner_up(sweep, best)
    digests = (requests[0][0].digest, prepared.inputs.digests["holdout"])
    name = runner_up.trial_id if runner_up is not None else None
    if (kept := _kept(sweep.folder / _FILE)) is not None and (kept.digests, kept.runner_up) == (
        digests,
        name,
    ):
        return kept
    if runner_up is not None:
        try:
            with best_checkpoint(Storage.at(below(sweep.storage, RAY)), runner_up) as source:
                own = examples.of(runner_up.config).holdout
                requests.append((AdapterFiles.read(source / ADAPTER), own))
        except CheckpointError as error:  # only the best one's must be whole
            print(f"note        the holdout is not measured for the runner-up: {error}", flush=True)
    try:
        found = answer_of(hosts, "measure", requests)
    except ray.exceptions.RayError as error:
        why = first_line(getattr(error, "cause", None) or error)
        raise StoppedError(f"the holdout could not be measured ({why}); {sweep.how_to_go_on}") from error
    holdout = Holdout(digests, tuple(found[0]), name, tuple(found[1]) if len(found) > 1 else ())
    write_json(sweep.folder / _FILE, asdict(holdout))
    return holdout


def holdout_is_due(sweep: SweepFolder, prepared: PreparedSweep) -> bool:
    """Tell whether the holdout is still to be measured, for which a sweep needs hosts."""
    return prepared.has_holdout and _kept(sweep.folder / _FILE) is None


def _runner_up(sweep: SweepFolder, best: BestAdapter) -> TrialRecord | None:
    """Return the best trial besides the best adapter."""
    records = [one for one in ranked(list(Ledger(sweep.folder / "trials").records.values())) if one.best]
    if best.soup is None:
        records = [record for record in records if record.trial_id != best.record.trial_id]
    return records[0] if records else None


def _kept(path: Path) -> Holdout | None:
    try:
        return _HOLDOUT.validate_python(read_json(path, ""))
    except (FileNotFoundError, InputError, ValidationError):
        return None  # it is measured again


def _figures(perplexities: tuple[float, ...]) -> dict[str, Any]:
    mean = sum(perplexities) / len(perplexities)
    return {"perplexity": mean, "interval": list(bootstrap_interval(perplexities))}
