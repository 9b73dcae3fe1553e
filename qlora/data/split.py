"""Owns which examples are public, and what sets have in common.

A share of a training set that is held out measures what a model has learned only if none of it was trained
on: examples that ask the same stand on one side. What sets have in common is counted by the SHA-256 of what
their examples ask, which is also how a set can be told again without its texts.

Refuses to know formats of files.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora.data.examples import as_json
from qlora.data.row_shapes import Example
from qlora.files import replacing_bytes

KEY_BYTES = 8  # of a SHA-256; two of a million examples share them by chance once in 37 million sets


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split examples into those to train on and a public share of about `fraction`, both in their order.

    Examples that ask the same are on one side. Both sides get at least one. Raises ValueError if all examples
    ask the same.
    """
    groups: dict[bytes, list[int]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(asked_key(example), []).append(number)
    if len(groups) < 2:
        raise ValueError("all examples ask the same, so that none can be held out")
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted, held_out = fraction * len(examples), set(order[0])
    for group in order[1:-1]:
        if len(held_out) + len(group) / 2 > wanted:
            break
        held_out.update(group)
    train = [example for number, example in enumerate(examples) if number not in held_out]
    return train, [examples[number] for number in sorted(held_out)]


def asked_key(example: Example) -> bytes:
    """Return what tells what an example asks: the first bytes of its SHA-256. Plain text asks itself.

    Whether a turn is learned makes no difference.
    """
    turns = tuple(replace(turn, is_learned=True) for turn in example.turns)
    _, asked, output = as_json(replace(example, turns=turns))
    content = json.dumps(asked if example.turns else output, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8")).digest()[:KEY_BYTES]


def asked_keys(examples: Iterable[Example]) -> frozenset[bytes]:
    """Return what tells what examples ask."""
    return frozenset(map(asked_key, examples))


def count_asked(examples: Iterable[Example], keys: frozenset[bytes]) -> int:
    """Count the examples that ask what others ask, which `keys` tells."""
    return sum(asked_key(example) in keys for example in examples)


def write_keys(path: Path, examples: Iterable[Example]) -> None:
    """Write what tells what examples ask, and nothing of their texts."""
    with replacing_bytes(path) as file:
        file.write(b"".join(sorted(asked_keys(examples))))


def read_keys(path: Path) -> frozenset[bytes]:
    """Read what `write_keys` wrote."""
    content = path.read_bytes()
    return frozenset(content[start : start + KEY_BYTES] for start in range(0, len(content), KEY_BYTES))


def as_row(example: Example) -> dict[str, Any]:
    """Return the row of a data file that this example is read from again."""
    if example.is_instruction:
        return {"id": example.id, "instruction": example.instruction, "output": example.output}
    if not example.turns:
        return {"id": example.id, "text": example.output}
    turns = [
        {"role": turn.role, "content": turn.content, **({} if turn.is_learned else {"weight": 0})}
        for turn in example.turns
    ]
    answer = [] if example.output is None else [{"role": "assistant", "content": example.output}]
    return {"id": example.id, "messages": [*turns, *answer]}
