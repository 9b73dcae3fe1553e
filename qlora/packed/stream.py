"""Owns what a packed stream is: token ids without padding, in parts, and who attends to whom.

    part:       prefix | suffix of example 0 | suffix of example 1 | ... | suffix of example N-1
    positions:  0..P-1 | P..                 | P..                 |     | P..

A suffix token attends to the whole prefix and, causally, to its own suffix: exactly what it would see in a padded row.
Position A's predictor is the stream token before it. A stream has one part, or one a trial: trials' prefixes read alike, but
their adapters make different keys of them. Refuses to know how examples become a stream, models and attention kernels.

Shapes: T stream tokens, P prefix tokens, N examples (rows) or rows of a bucket, L a bucket's longest suffix, B a bucket's
tokens, A scored (answer) positions.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True)
class Bucket:
    """Consecutive rows of like length, which attention lays out as one padded grid of `num_rows` times `row_length`.

    Its tokens are `num_tokens` consecutive ones of the stream; slots_B is the place of each in the flattened grid.
    """

    slots_B: torch.Tensor
    num_rows: int
    row_length: int

    @property
    def num_tokens(self) -> int:
        """Stream tokens B."""
        return self.slots_B.numel()


@dataclass(frozen=True)
class Rows:
    """Consecutive stretches of a stream, each causal in itself and behind one prefix of `prefix_length` tokens that is stored
    apart: their lengths in tokens, and what kernels need to know of them, made when it is asked for and kept."""

    lengths: tuple[int, ...]
    prefix_length: int
    device: torch.device
    _masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict, compare=False)

    @property
    def num_tokens(self) -> int:
        """Stream tokens of all rows."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    @cached_property
    def bounds(self) -> torch.Tensor:
        """Where rows begin and the last one ends: [N + 1] int32."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def as_one(self) -> "Rows":
        """All tokens as one row."""
        return Rows((self.num_tokens,), 0, self.device)

    @cached_property
    def prefix_row(self) -> "Rows":
        """The prefix as one row."""
        return Rows((self.prefix_length,), 0, self.device)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The rows as padded grids, in order."""
        return tuple(_bucket(run, self.device) for run in _like_lengths(self.lengths))

    def mask(self, row_length: int, sliding_window: int | None) -> torch.Tensor:
        """[L, P + L] bool, true where a token of a row of length L may look. Shorter rows need no mask of their own: what
        pads a row comes after its tokens, so causality hides it."""
        key = (row_length, sliding_window)
        if key not in self._masks:
            p = self.prefix_length
            distance = (
                torch.arange(p, p + row_length, device=self.device)[:, None]
                - torch.arange(p + row_length, device=self.device)[None]
            )
            self._masks[key] = (
                (distance >= 0) if sliding_window is None else (distance >= 0) & (distance < sliding_window)
            )
        return self._masks[key]


@dataclass(frozen=True)
class Part:
    """A group's place in a stream: its prefix (one row behind nothing) from token `start` on, then the rows behind the prefix."""

    start: int
    prefix: Rows
    suffixes: Rows

    @property
    def suffix_start(self) -> int:
        """The first token behind the prefix."""
        return self.start + self.prefix.num_tokens

    @property
    def end(self) -> int:
        """Behind the last token."""
        return self.suffix_start + self.suffixes.num_tokens


@dataclass(frozen=True)
class Layout:
    """A stream on the host, part behind part: token ids and positions; predictors_A, the stream index whose logits predict the answer
    token targets_A, which belongs to row rows_A, counted through all parts; num_answers: scored positions of each part."""

    ids_T: np.ndarray
    positions_T: np.ndarray
    predictors_A: np.ndarray
    targets_A: np.ndarray
    rows_A: np.ndarray
    parts: tuple[Part, ...]
    num_answers: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Stream tokens T."""
        return len(self.ids_T)

    @property
    def num_rows(self) -> int:
        """Examples N of all parts."""
        return sum(len(part.suffixes.lengths) for part in self.parts)

    @property
    def longest(self) -> int:
        """Tokens of the longest row with its prefix."""
        return max(part.prefix.num_tokens + part.suffixes.longest for part in self.parts)

    def row_means(self, values_A: np.ndarray) -> np.ndarray:
        """The mean over each row's scored positions: [N] float64."""
        sums_N = np.bincount(self.rows_A, weights=values_A, minlength=self.num_rows)
        return sums_N / np.bincount(self.rows_A, minlength=self.num_rows)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PackedBatch:
    """One forward pass's work on a device: a layout's tensors, its parts, and the tokens of the longest row with its prefix. A
    recorded pass knows its stretches, and no parts: those change while it stays."""

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    predictors_A: torch.Tensor
    targets_A: torch.Tensor
    parts: tuple[Part, ...]
    longest: int
    known_stretches: "Stretches | None" = None

    @property
    def num_tokens(self) -> int:
        """Stream tokens T."""
        return self.input_ids_T.numel()

    @property
    def prefix_length(self) -> int:
        """Tokens P of the first part's prefix."""
        return self.parts[0].prefix.num_tokens

    @cached_property
    def stretches(self) -> "Stretches":
        """What fused attention needs to know of the parts."""
        return self.known_stretches or Stretches.of(self.parts, self.input_ids_T.device)


@dataclass(frozen=True)
class Stretches:
    """Who attends to whom in a stream, as bounds of consecutive stretches (int32, one more than there are stretches) and the length of
    the longest. rows: a token attends causally to its own. parts: and to all tokens of its part's prefix, which prefixes
    bound in prefix_places_P (places in the stream). alone_T: true at tokens that look at no prefix, being part of one."""

    rows: torch.Tensor
    parts: torch.Tensor
    prefixes: torch.Tensor
    longest_row: int
    longest_part: int
    longest_prefix: int
    prefix_places_P: torch.Tensor
    alone_T: torch.Tensor

    @classmethod
    def of(cls, parts: Sequence[Part], device: torch.device) -> "Stretches":
        """Of all parts of a stream, moved to the device in two copies."""
        lengths = stretch_lengths(parts)
        places, alone = prefix_places(parts)
        bounds = [bounds_of(one) for one in lengths]
        whole = torch.from_numpy(np.concatenate(bounds)).to(device)
        rows, in_parts, prefixes = whole.split([len(one) for one in bounds])
        places_P, alone_T = (
            torch.from_numpy(np.concatenate([places, alone])).to(device).split([len(places), len(alone)])
        )
        row, part, prefix = (int(one.max()) for one in lengths)
        return cls(rows, in_parts, prefixes, row, part, prefix, places_P, alone_T.bool())


def stretch_lengths(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of every row (prefixes and suffixes, none of length 0), of every part, of every part's prefix: int32."""
    rows = [length for part in parts for length in (*part.prefix.lengths, *part.suffixes.lengths) if length]
    return (
        np.array(rows, np.int32),
        np.array([part.end - part.start for part in parts], np.int32),
        np.array([part.prefix.num_tokens for part in parts], np.int32),
    )


def prefix_places(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """(where prefix tokens stand in the stream [P], whether a token looks at no prefix [T]), int64."""
    places = np.concatenate([np.arange(part.start, part.suffix_start) for part in parts])
    alone = np.zeros(parts[-1].end, np.int64)
    alone[places] = 1
    for part in parts:
        if not part.prefix.num_tokens:
            alone[part.start : part.end] = 1
    return places, alone


def bounds_of(lengths: np.ndarray) -> np.ndarray:
    """Where consecutive stretches begin and the last one ends: [n + 1] int32."""
    return np.concatenate([[0], lengths.cumsum()]).astype(np.int32)  # type: ignore[no-any-return]


def _like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Runs of consecutive lengths that fill at least three quarters of a grid as wide as the run's longest."""
    runs: list[list[int]] = []
    for length in lengths:
        run = [*runs[-1], length] if runs else [length]
        if runs and 4 * min(run) >= 3 * max(run):
            runs[-1] = run
        else:
            runs.append([length])
    return runs


def _bucket(lengths: Sequence[int], device: torch.device | str) -> Bucket:
    slots = [row * max(lengths) + column for row, length in enumerate(lengths) for column in range(length)]
    return Bucket(torch.tensor(slots, device=device), len(lengths), max(lengths))
