"""Owns the slots that are searched together, and what leads their passes through several adapters.

Prompts are of one part, or of several, each with an adapter of its own. A part's slots stand together, and
keep to it as long as a batch lasts, so that a recorded step finds each token's adapter.

Refuses to know how tokens are chosen and models.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from inference.beam_search import SearchState
from inference.kv_cache import KVCache

Piece = tuple[int, int, int]  # of a pass: whose tokens they are, the first of them, and their end
Way = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Ways:
    """How prompts of several parts, each with an adapter of its own, are searched together.

    parts: each prompt's. way_of: from the pieces of a pass to what leads it through their parts' adapters,
    which is entered for each pass of such pieces.
    """

    parts: Sequence[int]
    way_of: Callable[[Sequence[Piece]], Way]

    @classmethod
    def one(cls, num_prompts: int) -> "Ways":
        """Make the way of prompts that the model takes as they are."""
        return cls([0] * num_prompts, lambda pieces: nullcontext)


@dataclass(frozen=True)
class _Notice:
    """Which searches have ended when a step is over. examples: whose slots they were as it was launched."""

    examples: list[int | None]
    done_E: Tensor
    is_there: torch.cuda.Event


@dataclass
class Batch:
    """The slots that are searched together.

    parts: each slot's, ascending. examples: the index of each slot's prompt, None for a free slot. steps: the
    tokens that each slot has chosen. generators: each slot's own, for sampling. way: of decode steps. graph:
    the recorded decode step, on a GPU.
    """

    cache: KVCache
    state: SearchState
    parts: list[int]
    examples: list[int | None]
    steps: list[int]
    generators: list[torch.Generator]
    way: Way | None = None
    graph: torch.cuda.CUDAGraph | None = None
    _notices: deque[_Notice] = field(default_factory=deque)
    _beside: torch.cuda.Stream | None = None

    @property
    def free(self) -> list[int]:
        """Return the slots without an example."""
        return [slot for slot, example in enumerate(self.examples) if example is None]

    def by_part(self, slots: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Return some of the slots by their parts."""
        return [(part, list(alike)) for part, alike in groupby(slots, lambda slot: self.parts[slot])]

    def clear(self) -> None:
        """Free all slots."""
        self.examples = [None] * len(self.examples)
        self._notices.clear()

    def give_notice(self) -> None:
        """Have the device tell who is done, once it has come to the end of what it was given so far."""
        done_E = torch.empty(self.state.done_E.shape, dtype=torch.bool, pin_memory=True)
        done_E.copy_(self.state.done_E, non_blocking=True)
        is_there = torch.cuda.Event()
        is_there.record()
        self._notices.append(_Notice(list(self.examples), done_E, is_there))

    def take_done(self, is_under_way: bool = False) -> list[tuple[int, list[int]]]:
        """Return (index, new tokens) of the prompts whose search has ended, and free their slots.

        However many there are, they are fetched from the device at once. `is_under_way`: whether the device
        is not to be waited for, which has been given a step, with a notice; then those are returned that had
        ended before it.
        """
        if not is_under_way:
            self._notices.clear()
            return self._fetch(self.state.done_E, self.examples)
        if len(self._notices) < 2:
            return []
        before = self._notices.popleft()
        before.is_there.synchronize()
        self._beside = self._beside or torch.cuda.Stream()
        with torch.cuda.stream(self._beside):  # what a search that has ended has found stays as it is
            return self._fetch(before.done_E, before.examples)

    def _fetch(self, done_E: Tensor, examples: Sequence[int | None]) -> list[tuple[int, list[int]]]:
        """Fetch what was found for those of the examples that are done, and still have their slots."""
        state = self.state
        ended = [slot for slot, is_done in enumerate(done_E.tolist()) if is_done]
        whose = {
            slot: example
            for slot in ended
            if (example := examples[slot]) is not None and example == self.examples[slot]
        }
        if not whose:
            return []
        chosen = torch.tensor(list(whose), device=state.done_E.device)
        lengths, tokens = state.best_lengths_EK[chosen, 0].tolist(), state.best_tokens_EKT[chosen, 0].tolist()
        for slot in whose:
            self.examples[slot] = None
        return [(example, own[:n]) for example, own, n in zip(whose.values(), tokens, lengths, strict=True)]

    def keep(self, slots: list[int]) -> "Batch":
        """Return a batch of some of the slots, in that order."""
        chosen = torch.tensor(slots, device=self.state.done_E.device)
        return Batch(
            cache=self.cache.keep(chosen),
            state=self.state.keep(chosen),
            parts=[self.parts[slot] for slot in slots],
            examples=[self.examples[slot] for slot in slots],
            steps=[self.steps[slot] for slot in slots],
            generators=[self.generators[slot] for slot in slots],
        )


def pieces_of(parts: Sequence[int], lengths: Sequence[int]) -> list[Piece]:
    """Return the pieces of a pass, of whose rows, by part, are given the parts and numbers of tokens."""
    pieces, start = list[Piece](), 0
    for part, rows in groupby(zip(parts, lengths, strict=True), lambda row: row[0]):
        end = start + sum(length for _, length in rows)
        pieces.append((part, start, end))
        start = end
    return pieces


def in_passes(lengths: Sequence[int], most: int) -> list[range]:
    """Return which rows go through a pass together: neighbours of at most so many tokens, or one row."""
    runs, start, total = list[range](), 0, 0
    for place, length in enumerate(lengths):
        if place > start and total + length > most:
            runs.append(range(start, place))
            start, total = place, 0
        total += length
    return [*runs, range(start, len(lengths))] if lengths else []


def share_slots(num_slots: int, counts: Mapping[int, int]) -> list[int]:
    """Return the part of each slot: parts, of so many prompts each, share the slots by their prompts.

    Where there are fewer slots than parts, the last parts have none.
    """
    shares = dict.fromkeys(sorted(counts)[:num_slots], 1)
    for _ in range(min(num_slots, sum(counts[part] for part in shares)) - len(shares)):
        short = [part for part in shares if shares[part] < counts[part]]
        shares[max(short, key=lambda part: counts[part] / shares[part])] += 1
    return [part for part, share in shares.items() for _ in range(share)]
