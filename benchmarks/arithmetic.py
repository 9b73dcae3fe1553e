"""Owns a second task beside the course's: sums in words with their working, drawn by a seed.

    python benchmarks/arithmetic.py FOLDER [--seed 0]

A question takes two steps with numbers of up to four digits, and tells in two of three kinds of one that is
not asked for. The answer writes each step and its result, as in `348 - 127 = 221; 221 + 5 x 36 = 401`. FOLDER
gets train.json (2,000 rows), public.json (250) and unseen.json (500); no question stands twice.
"""

import argparse
import json
import random
from pathlib import Path

_SIZES = {"train": 2000, "public": 250, "unseen": 500}
_NAMES = "Ada Boris Chen Dalia Emre Fatima Goran Hana Ivo Jun Kofi Lena Mira Nadia Omar Petra Quinn Rosa"
_THINGS = "apples bricks candles cups eggs keys lamps letters maps nails pears plates ropes stamps tiles"


def _sold_and_bought(draw: random.Random, name: str, thing: str) -> tuple[str, str]:
    first, sold = draw.randint(300, 2999), draw.randint(20, 299)
    boxes, each = draw.randint(2, 9), draw.randint(11, 79)
    left = first - sold
    return (
        f"{name} has {first} {thing} at {draw.randint(2, 99)} cents each, sells {sold} of them and buys "
        f"{boxes} boxes with {each} in each. How many {thing} are there now?",
        f"{first} - {sold} = {left}; {left} + {boxes} x {each} = {left + boxes * each}",
    )


def _change(draw: random.Random, name: str, thing: str) -> tuple[str, str]:
    count, price = draw.randint(3, 9), draw.randint(12, 97)
    paid = count * price + draw.randint(1, 999)
    return (
        f"On day {draw.randint(2, 30)}, {name} buys {count} {thing} for {price} cents each and pays with "
        f"{paid} cents. How many cents are given back?",
        f"{count} x {price} = {count * price}; {paid} - {count * price} = {paid - count * price}",
    )


def _days(draw: random.Random, name: str, thing: str) -> tuple[str, str]:
    one, two, three = (draw.randint(15, 899) for _ in range(3))
    both = one + two
    return (
        f"{name}, who is {draw.randint(18, 80)}, counted {one} {thing} on Monday, {two} on Tuesday and "
        f"{three} on Wednesday. How many in all?",
        f"{one} + {two} = {both}; {both} + {three} = {both + three}",
    )


_STORIES = (_sold_and_bought, _change, _days)


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Draw so many rows, all of them different: id, instruction and output."""
    generator, known = random.Random(seed), dict[str, str]()
    names, things = _NAMES.split(), _THINGS.split()
    while len(known) < count:
        story = generator.choice(_STORIES)
        question, working = story(generator, generator.choice(names), generator.choice(things))
        known[question] = working
    return [
        {"id": f"a{number}", "instruction": question, "output": working}
        for number, (question, working) in enumerate(known.items())
    ]


def write_task(folder: Path, seed: int) -> dict[str, Path]:
    """Write the files of the task; returns their paths by set."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, paths = make_rows(sum(_SIZES.values()), seed), {}
    for name, size in _SIZES.items():
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(json.dumps(rows[:size], indent=1), encoding="utf-8")
        rows = rows[size:]
    return paths


def main() -> None:
    """Write the task and say where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, path in write_task(arguments.folder, arguments.seed).items():
        print(f"{name:<7} {path}")


if __name__ == "__main__":
    main()
