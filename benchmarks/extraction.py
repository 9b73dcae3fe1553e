"""Owns a second task beside the course's: fields of a made-up notice, drawn by a seed.

    python benchmarks/extraction.py FOLDER [--seed 0]

A notice names a person, a place, a day and an amount, in one of several orders and wordings, with a second
person and amount that are not asked for. The answer is `person; place; day; amount`. FOLDER gets train.json
(2,000 rows), public.json (250) and unseen.json (500); no notice stands twice.
"""

import argparse
import json
import random
from pathlib import Path

_SIZES = {"train": 2000, "public": 250, "unseen": 500}
_FIRST = "Ada Boris Chen Dalia Emre Fatima Goran Hana Ivo Jun Kofi Lena Mira Nadia Omar Petra Quinn Rosa"
_LAST = "Abel Brandt Costa Duarte Eriksen Fischer Garcia Haddad Ito Jansen Kaya Lopez Moreau Novak Okoye"
_PLACES = "Accra Bergen Cusco Dakar Esbjerg Fukuoka Galway Haifa Izmir Jaipur Kyoto Lagos Malmo Nairobi"
_MONTHS = "January February March April May June July August September October November December"
_FOR = ("a bicycle", "two lamps", "a rented boat", "six chairs", "an old piano", "a week's lodging")
_NOTICES = (
    "On {day}, {person} paid {amount} in {place} for {thing}; {other} had asked for {more} at first.",
    "{other} writes that {thing} went to {person} of {place} on {day}, for {amount} and not {more}.",
    "Sold in {place}: {thing}. Buyer: {person}. Price: {amount}; {other} had offered {more}. Date: {day}.",
    "{person} owes {other} nothing: {amount} for {thing} were paid on {day}, in {place}, not {more}.",
    "For {thing}, {other} got {amount} from {person} ({place}, {day}); the insurance of {more} is apart.",
)


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Draw so many rows, all of them different: id, instruction and output."""
    generator, known = random.Random(seed), dict[str, str]()
    first, last, places, months = (names.split() for names in (_FIRST, _LAST, _PLACES, _MONTHS))
    while len(known) < count:
        person, other = (f"{generator.choice(first)} {generator.choice(last)}" for _ in range(2))
        facts = {
            "person": person,
            "place": generator.choice(places),
            "day": f"{generator.randint(1, 28)} {generator.choice(months)} {generator.randint(1990, 2025)}",
            "amount": f"{generator.randint(3, 9999)} crowns",
        }
        more, thing = f"{generator.randint(3, 9999)} crowns", generator.choice(_FOR)
        if other != person and more != facts["amount"]:
            notice = generator.choice(_NOTICES).format(**facts, other=other, more=more, thing=thing)
            known[notice] = "; ".join(facts.values())
    asked = "Write buyer, place, date and price, with semicolons between them.\n"
    return [
        {"id": f"x{number}", "instruction": asked + notice, "output": answer}
        for number, (notice, answer) in enumerate(known.items())
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
