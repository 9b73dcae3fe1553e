"""Owns what people ask of a sweep while it runs: orders, each a small file beside its results.

    PLACE/orders/TIME-RANDOM.json    {"kind": "stop", "trial_id": ...} or {"kind": "add", "count": ...} or
                                     {"kind": "clone", "trial_id": ..., "settings": {...}, "is_warm": true}

Whoever can write to the home can give orders, from any machine; the sweep looks for them again and again, and
one that goes on later finds them, too. Nothing is ever removed: what a sweep was asked is part of its record.
Loads nothing heavy.
"""

import json
import secrets
import time
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs
from pydantic import Field, ValidationError

from qlora.config import Settings
from qlora.files import below, write_json
from tuning.checkpoints import Storage

_FOLDER = "orders"
_SECONDS_BETWEEN_LOOKS = 1.0
MOST_ADDED = 1000  # trials, by hand
BY_HAND = "stopped by hand"
SET_ASIDE = "set_aside"  # reported by a trial that leaves its seat to a clone: was that between two reports?


class Order(Settings):
    """Something asked of a sweep: to stop a trial, to draw so many more, or to run one with other settings.

    is_warm: whether a clone begins with the adapter as the trial has it, not with a fresh one.
    """

    kind: Literal["stop", "add", "clone"]
    trial_id: str | None = None
    count: int = Field(0, ge=0)
    settings: dict[str, Any] = Field(default_factory=dict)
    is_warm: bool = False


def give_order(place: str, order: Order) -> None:
    """Leave an order at a sweep's place, a folder or a URI. Raises OSError."""
    name = f"{time.time_ns()}-{secrets.token_hex(4)}.json"
    content = order.model_dump(exclude_defaults=True)
    if "://" not in place:
        write_json(Path(place) / _FOLDER / name, content)
        return
    storage = Storage.at(below(place, _FOLDER))
    storage.filesystem.create_dir(storage.path)
    with storage.filesystem.open_output_stream(f"{storage.path}/{name}") as file:
        file.write(json.dumps(content).encode("utf-8"))


class Orders:
    """The orders at a sweep's place, as far as they are known.

    stops: ids of trials. added: how many trials there are more, clones among them. draws: how many of them
    were asked for at a time, clones left out. clones: by the names of their orders, in the order in which
    they were asked for.
    """

    def __init__(self, place: str):
        """Look at once."""
        self._storage = Storage.at(below(place, _FOLDER))
        self._known: dict[str, Order | None] = {}
        self._looked_at = float("-inf")
        self.stops = set[str]()
        self.added, self.draws = 0, list[int]()
        self.clones = dict[str, Order]()
        self.look()

    def look(self) -> bool:
        """Take in new orders, if it is time to; tells whether it looked. One that can't be read is none."""
        if time.monotonic() - self._looked_at < _SECONDS_BETWEEN_LOOKS:
            return False
        self._looked_at = time.monotonic()
        selector = pyarrow.fs.FileSelector(self._storage.path, allow_not_found=True)
        for info in sorted(self._storage.filesystem.get_file_info(selector), key=lambda info: info.path):
            if info.path.endswith(".json") and info.path not in self._known:
                order = self._known[info.path] = self._read(info.path)
                if order is not None and order.kind == "add":
                    self.draws.append(min(MOST_ADDED - self.added, order.count))
                    self.added += self.draws[-1]
                elif order is not None and order.kind == "clone" and self.added < MOST_ADDED:
                    self.added += 1
                    self.clones[info.base_name] = order
                elif order is not None and order.trial_id:
                    self.stops.add(order.trial_id)
        return True

    def _read(self, path: str) -> Order | None:
        try:
            with self._storage.filesystem.open_input_stream(path) as file:
                return Order.model_validate_json(file.read())
        except (OSError, ValidationError):
            return None
