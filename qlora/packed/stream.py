"""Owns what a packed stream is: token ids without padding, in parts, and who attends to whom.

    part:       prefix | suffix of example 0 | suffix of example 1 | ... | suffix of example N-1
    positions:  0..P-1 | P..                 | P..                 |     | P..

Padding examples to the same length wastes work on tokens that mean nothing. A packed sequence has none:
examples stand one behind the other, and attention is kept from crossing their borders
(https://arxiv.org/abs/2107.02027). The prefix, which all prompts of a part begin with, is stored and computed
once.

A suffix token attends to the whole prefix and, causally, to its own suffix: exactly what it would see in a
padded row. The token at a scored position is predicted from the stream token before it. A stream has one
part, or one for each trial: trials' prefixes have the same tokens, but different adapters compute different
keys from them.

Refuses to know how examples become a stream, models and attention kernels.

Shapes: T stream tokens, P prefix tokens, N examples (rows), or rows of a bucket, L a bucket's longest suffix,
B a bucket's tokens, A scored (answer) positions.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True)
class Bucket:
    """Consecutive rows of similar length, which attention lays out as one padded grid.

    The grid is `num_rows` times `row_length`. Its tokens are `num_tokens` consecutive tokens of the stream;
    slots_B is the place of each in the flattened grid.
    """

    slots_B: torch.Tensor
    num_rows: int
    row_length: int

    @property
    def num_tokens(self) -> int:
        """Count the stream tokens B."""
        return self.slots_B.numel()


@dataclass(frozen=True)
class Rows:
    """Consecutive stretches of a stream, each causal in itself and behind one prefix.

    lengths: tokens of each row. prefix_length: tokens of the prefix, which is stored apart. What kernels need
    to know of rows is computed when it is first asked for, and kept.
    """

    lengths: tuple[int, ...]
    prefix_length: int
    device: torch.device
    _masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict, compare=False)

    @property
    def num_tokens(self) -> int:
        """Count the stream tokens of all rows."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest row."""
        return max(self.lengths)

    @cached_property
    def bounds(self) -> torch.Tensor:
        """Return where rows begin and where the last one ends: [N + 1] int32."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def as_one(self) -> "Rows":
        """Return all tokens as one row."""
        return Rows((self.num_tokens,), 0, self.device)

    @cached_property
    def prefix_row(self) -> "Rows":
        """Return the prefix as one row."""
        return Rows((self.prefix_length,), 0, self.device)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Return the rows as padded grids, in order."""
        return tuple(_bucket(run, self.device) for run in _similar_lengths(self.lengths))

    def mask(self, row_length: int, sliding_window: int | None) -> torch.Tensor:
        """Return the attention mask of a row of length L: [L, P + L] bool, true where a token may look.

        Shorter rows need no mask of their own: what pads a row comes after its tokens, so causality hides it.
        """
        key = (row_length, sliding_window)
        if key not in self._masks:
            end = self.prefix_length + row_length
            queries = torch.arange(self.prefix_length, end, device=self.device)
            keys = torch.arange(end, device=self.device)
            distance = queries[:, None] - keys[None]
            mask = distance >= 0
            if sliding_window is not None:
                mask = mask & (distance < sliding_window)
            self._masks[key] = mask
        return self._masks[key]


@dataclass(frozen=True)
class Part:
    """A group's place in a stream.

    Its prefix, one row behind nothing, begins at token `start`; the rows behind the prefix follow.
    """

    start: int
    prefix: Rows
    suffixes: Rows

    @property
    def suffix_start(self) -> int:
        """Return the place of the first token behind the prefix."""
        return self.start + self.prefix.num_tokens

    @property
    def end(self) -> int:
        """Return the place behind the last token."""
        return self.suffix_start + self.suffixes.num_tokens


@dataclass(frozen=True)
class Layout:
    """A stream on the host, part behind part.

    ids_T, positions_T: token ids and their positions. predictors_A: the stream index whose logits predict an
    answer token. targets_A: that token's id. rows_A: the row it belongs to, counted through all parts.
    num_answers: scored positions of each part.
    """

    ids_T: np.ndarray
    positions_T: np.ndarray
    predictors_A: np.ndarray
    targets_A: np.ndarray
    rows_A: np.ndarray
    parts: tuple[Part, ...]
    num_answers: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Count the stream tokens T."""
        return len(self.ids_T)

    @property
    def num_rows(self) -> int:
        """Count the examples N of all parts."""
        return sum(len(part.suffixes.lengths) for part in self.parts)

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest row with its prefix."""
        return max(part.prefix.num_tokens + part.suffixes.longest for part in self.parts)

    def row_means(self, values_A: np.ndarray) -> np.ndarray:
        """Average values over each row's scored positions: [N] float64."""
        sums_N = np.bincount(self.rows_A, weights=values_A, minlength=self.num_rows)
        counts_N = np.bincount(self.rows_A, minlength=self.num_rows)
        return sums_N / counts_N  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PackedBatch:
    """One forward pass's work on a device: a layout's tensors and its parts.

    longest: tokens of the longest row with its prefix. known_stretches: given by a recorded pass, which has
    no parts: parts change from one replay to the next, while the tensors of its stretches stay.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    predictors_A: torch.Tensor
    targets_A: torch.Tensor
    parts: tuple[Part, ...]
    longest: int
    known_stretches: "Stretches | None" = None

    @property
    def num_tokens(self) -> int:
        """Count the stream tokens T."""
        return self.input_ids_T.numel()

    @property
    def prefix_length(self) -> int:
        """Return the number of tokens P of the first part's prefix."""
        return self.parts[0].prefix.num_tokens

    @cached_property
    def stretches(self) -> "Stretches":
        """Return what fused attention needs to know of the parts."""
        return self.known_stretches or Stretches.of(self.parts, self.input_ids_T.device)


@dataclass(frozen=True)
class Stretches:
    """Bounds of consecutive stretches of a stream, which say who attends to whom.

    Bounds are int32, one more than there are stretches; longest_* is the length of the longest stretch of a
    kind. A token attends causally to its own stretch of `rows`, and to all prefix tokens of its stretch of
    `parts`. Those are the stretch of prefix_places_P (places in the stream) with the same number in
    `prefixes`. alone_T is true at tokens that look at no prefix: they are part of one, or their part has
    none.
    """

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
        """Make the stretches of all parts of a stream, and move them to the device in two copies."""
        lengths = stretch_lengths(parts)
        bounds = [bounds_of(one) for one in lengths]
        all_bounds = torch.from_numpy(np.concatenate(bounds)).to(device)
        rows, in_parts, prefixes = all_bounds.split([len(one) for one in bounds])
        places, alone = prefix_places(parts)
        places_and_alone = torch.from_numpy(np.concatenate([places, alone])).to(device)
        places_P, alone_T = places_and_alone.split([len(places), len(alone)])
        longest_row, longest_part, longest_prefix = (int(one.max()) for one in lengths)
        return cls(
            rows=rows,
            parts=in_parts,
            prefixes=prefixes,
            longest_row=longest_row,
            longest_part=longest_part,
            longest_prefix=longest_prefix,
            prefix_places_P=places_P,
            alone_T=alone_T.bool(),
        )


def stretch_lengths(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count the tokens of every row, of every part and of every part's prefix: three int32 arrays.

    Rows are prefixes and suffixes; a prefix of length 0 is left out.
    """
    rows = [length for part in parts for length in (*part.prefix.lengths, *part.suffixes.lengths) if length]
    return (
        np.array(rows, np.int32),
        np.array([part.end - part.start for part in parts], np.int32),
        np.array([part.prefix.num_tokens for part in parts], np.int32),
    )


def prefix_places(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """Return where prefix tokens stand in the stream [P], and which tokens look at no prefix [T].

    Both are int64; the second is 1 at such tokens, else 0.
    """
    places = np.concatenate([np.arange(part.start, part.suffix_start) for part in parts])
    alone = np.zeros(parts[-1].end, np.int64)
    alone[places] = 1
    for part in parts:
        if not part.prefix.num_tokens:
            alone[part.start : part.end] = 1
    return places, alone


def bounds_of(lengths: np.ndarray) -> np.ndarray:
    """Return where consecutive stretches begin and where the last one ends: [n + 1] int32."""
    return np.concatenate([[0], lengths.cumsum()]).astype(np.int32)  # type: ignore[no-any-return]


def _similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Cut lengths into runs of consecutive ones, none shorter than three quarters of its run's longest."""
    runs: list[list[int]] = []
    for length in lengths:
        run = [*runs[-1], length] if runs else [length]
        if runs and 4 * min(run) >= 3 * max(run):
            runs[-1] = run
        else:
            runs.append([length])
    return runs


def _bucket(lengths: Sequence[int], device: torch.device | str) -> Bucket:
    """Lay rows of these lengths out as a grid as wide as the longest."""
    row_length = max(lengths)
    slots: list[int] = []
    for row, length in enumerate(lengths):
        slots += range(row * row_length, row * row_length + length)
    return Bucket(torch.tensor(slots, device=device), num_rows=len(lengths), row_length=row_length)
