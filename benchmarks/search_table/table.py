"""Owns the search table's file: written of parts, and read as rows that benchmarks and tests can ask.

A compressed JSON (xz): perplexities are kept as whole thousandths of their logarithm, which is far below the
noise between seeds.
"""

import json
import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("table.json.xz")
CARD_FACTS = "facts"  # how parts name what was measured besides trials
_SCALE = 1000


@dataclass(frozen=True)
class End:
    """The end of a stage, where a trial is a result: its step, and perplexities of examples."""

    step: int
    public: tuple[float, ...]
    unseen: tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """A point of a trial's curve.

    training_loss: mean over the steps since the point before. seconds: of its own part of passes up to here.
    evaluation_seconds: of this one measurement.
    """

    step: int
    training_loss: float
    public_perplexity: float
    seconds: float
    evaluation_seconds: float


@dataclass(frozen=True)
class Row:
    """A trial that was trained whole. error: why it diverged, or nothing."""

    number: int
    seed: int
    config: dict[str, Any]
    points: tuple[Point, ...]
    ends: tuple[End, ...]
    tokens: int
    error: str


@dataclass(frozen=True)
class Table:
    """All rows, and what was measured besides.

    facts: of each run that made a part; its `costs` are steps: (trials, tokens, tokens x rank, seconds).
    """

    rows: tuple[Row, ...]
    facts: tuple[dict[str, Any], ...]


def write_table(parts: Path, target: Path) -> str:
    """Write the table of parts; returns a line that says what it holds."""
    trials = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(parts.glob("trial-*.json"))]
    facts = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(parts.glob(f"{CARD_FACTS}-*.json"))
    ]
    for trial in trials:
        trial["points"] = [
            [step, round(loss, 4), round(perplexity, 4), round(seconds, 3), round(evaluation, 4)]
            for step, loss, perplexity, seconds, evaluation in trial["points"]
        ]
        for end in trial["ends"]:
            for kind in ("public", "unseen"):
                end[kind] = [round(_SCALE * math.log(value)) for value in end[kind]]
    content = json.dumps({"trials": trials, "facts": facts}, separators=(",", ":"))
    target.write_bytes(lzma.compress(content.encode(), preset=9))
    return f"{len(trials)} trials, {target.stat().st_size / 2**20:.2f} MiB"


def unpack_table(source: Path, parts: Path) -> None:
    """Write the parts that a table was made of, for what it lacks to be made beside them."""
    content = json.loads(lzma.decompress(source.read_bytes()))
    parts.mkdir(parents=True, exist_ok=True)
    for trial in content["trials"]:
        for end in trial["ends"]:
            for kind in ("public", "unseen"):
                end[kind] = [math.exp(value / _SCALE) for value in end[kind]]
        place = parts / f"trial-{trial['number']:03d}-{trial['seed']}.json"
        place.write_text(json.dumps(trial), encoding="utf-8")
    for number, facts in enumerate(content["facts"]):
        (parts / f"{CARD_FACTS}-{number:03d}.json").write_text(json.dumps(facts), encoding="utf-8")


def read_table(path: Path = TABLE) -> Table:
    """Read a table."""
    content = json.loads(lzma.decompress(path.read_bytes()))

    def perplexities(values: Sequence[int]) -> tuple[float, ...]:
        return tuple(math.exp(value / _SCALE) for value in values)

    rows = [
        Row(
            number=trial["number"],
            seed=trial["seed"],
            config=trial["config"],
            points=tuple(Point(*point) for point in trial["points"]),
            ends=tuple(
                End(end["step"], perplexities(end["public"]), perplexities(end["unseen"]))
                for end in trial["ends"]
            ),
            tokens=trial["tokens"],
            error=trial["error"],
        )
        for trial in content["trials"]
    ]
    return Table(tuple(rows), tuple(content["facts"]))
