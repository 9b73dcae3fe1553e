"""Owns the words that people read while a sweep runs and when it ends: pure functions, records -> text."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora.config import TrialData, TrialSettings, split_config
from tuning.ledger import TrialRecord, full_epochs, ranked, share_of_epochs_saved
from tuning.objective import Objective
from tuning.spending import Spent
from tuning.strategy import Budget

Base = float | Mapping[str, float]
_PERPLEXITY = Objective()
_MARKS = {"pending": "·", "running": "▶", "finished": "✓", "stopped": "■", "failed": "✗", "diverged": "↯"}


def table(
    records: Sequence[TrialRecord], zero_shot: Base, limit: int = 24, objective: Objective = _PERPLEXITY
) -> str:
    """Lay out trials, the best first: configuration, progress, best and last figure, status.

    `zero_shot`: the objective's value for the base alone, or its values by prompt.
    """
    shown = [key for key in TrialData.model_fields if any(key in record.config for record in records)]
    heads = ("", "trial", "lr", "r", "alpha", "dropout", "epochs", *(key.replace("_", " ") for key in shown))
    rows: list[tuple[str, ...]] = [(*heads, *_heads(objective), "status")]
    for record in ranked(records)[:limit]:
        settings = TrialSettings.model_validate(split_config(record.config)[0])
        best, last = record.best, record.curve[-1] if record.curve else None
        rows.append(
            (
                _MARKS[record.status],
                record.trial_id,
                f"{settings.learning_rate:.2e}",
                str(settings.lora_r),
                f"{settings.lora_alpha:g}",
                f"{settings.lora_dropout:.3g}",
                str(settings.epochs),
                *(Path(str(record.config.get(key, "-"))).name for key in shown),
                f"{record.percent:.0f}%",
                _number(best, objective),
                _number(last, objective),
                _beside(best, _base_of(record, zero_shot), objective),
                record.status,
            )
        )
    text = _aligned(rows)
    return text if len(records) <= limit else f"{text}\n  and {len(records) - limit} more"


def headline(
    records: Sequence[TrialRecord],
    num_trials: int,
    elapsed_seconds: float,
    objective: Objective = _PERPLEXITY,
) -> str:
    """Write one line: trials by status, the best so far, elapsed time, an upper bound of what remains."""
    counts = {status: sum(record.status == status for record in records) for status in _MARKS}
    ended = counts["finished"] + counts["stopped"] + counts["failed"] + counts["diverged"]
    num_cut = sum(record.is_cut for record in records)
    best = next((record for record in ranked(records) if record.best), None)
    parts = [
        f"{ended}/{num_trials} trials ended",
        f"{counts['running']} running",
        f"{counts['stopped'] - num_cut} stopped early",
        *([f"{num_cut} cut"] if num_cut else []),
    ]
    parts += [f"{counts[status]} {status}" for status in ("failed", "diverged") if counts[status]]
    if best is not None and best.best is not None:
        parts.append(f"best {_number(best.best, objective)} ({best.trial_id})")
    parts += [
        f"elapsed {clock(elapsed_seconds)}",
        f"at most {_remaining(records, num_trials, elapsed_seconds)} left",
    ]
    return ", ".join(parts)


def ranking(records: Sequence[TrialRecord], zero_shot: Base, objective: Objective = _PERPLEXITY) -> str:
    """Lay out the closing table, with what early stopping saved, if it ended any trial."""
    whole, base = table(records, zero_shot, len(records), objective), _bases(zero_shot)
    return f"{whole}\nzero-shot {objective.words} {base}; {what_stopping_saved(records)}"


def what_stopping_saved(records: Sequence[TrialRecord]) -> str:
    """Write how many trials there were and, if early stopping ended some, what it saved of their epochs."""
    stopped = sum(record.status == "stopped" and not record.is_cut for record in records)
    if not stopped:
        return f"{len(records)} trials"
    ended = f"early stopping ended {stopped} of {len(records)} trials"
    return f"{ended} and saved {share_of_epochs_saved(records):.0%} of the full-length epochs"


def spending(spent: Spent, budget: Budget | None, has_gpu: bool) -> str:
    """Write one line: what trials have spent, and whether that was the budget."""
    gpus = f", {spent.device_seconds:.0f} GPU-seconds" if has_gpu else ""
    over = f"; the budget of {budget.words} is spent" if budget is not None and spent.is_over else ""
    return f"spent       {clock(spent.seconds)} of trials{gpus}{over}"


def where_time_went(seconds: Mapping[str, float]) -> str:
    """Write one line: the share of each kind of work in what hosts did; empty if they did nothing."""
    whole = sum(seconds.values())
    shares = ", ".join(
        f"{work} {part / whole:.0%}" for work, part in seconds.items() if round(100 * part / max(whole, 1e-9))
    )
    return f"hosts       {shares} of {clock(whole)}" if shares else ""


def clock(seconds: float) -> str:
    """Write seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _remaining(records: Sequence[TrialRecord], num_trials: int, elapsed_seconds: float) -> str:
    """Estimate the time left if no further trial were stopped.

    Epochs still to do, at the pace of those done so far; trials that nobody has drawn yet have as many as
    those that are known.
    """
    whole = [full_epochs(record) for record in records]
    shares = [record.percent / 100 for record in records]
    done = sum(epochs * share for epochs, share in zip(whole, shares, strict=True))
    left = sum(
        epochs * (1 - share)
        for record, epochs, share in zip(records, whole, shares, strict=True)
        if record.status in ("pending", "running")
    )
    left += (num_trials - len(records)) * sum(whole) / max(len(records), 1)
    return clock(elapsed_seconds * left / done) if done else "?"


def _heads(objective: Objective) -> tuple[str, ...]:
    return ("done", f"best {objective.label}", f"last {objective.label}", "vs zero-shot")


def _number(point: dict[str, float] | None, objective: Objective) -> str:
    return f"{objective.value_at(point):.4g}" if point else "-"


def _base_of(record: TrialRecord, zero_shot: Base) -> float:
    """Return what the base alone has under a trial's own prompt."""
    if isinstance(zero_shot, Mapping):
        return zero_shot.get(record.config.get("prompt") or "", next(iter(zero_shot.values())))
    return zero_shot


def _bases(zero_shot: Base) -> str:
    if isinstance(zero_shot, Mapping) and len(zero_shot) > 1:
        return ", ".join(f"{value:.4g} ({name})" for name, value in zero_shot.items())
    return f"{next(iter(zero_shot.values())) if isinstance(zero_shot, Mapping) else zero_shot:.4g}"


def _beside(point: dict[str, float] | None, zero_shot: float, objective: Objective) -> str:
    """Set a trial's best beside the base alone: as a share for perplexity, else as a difference."""
    if point is None:
        return "-"
    value = objective.value_at(point)
    return f"{value / zero_shot - 1:+.1%}" if objective.is_perplexity else f"{value - zero_shot:+.4g}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
