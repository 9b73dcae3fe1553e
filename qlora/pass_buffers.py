"""Owns what a recorded pass reads: buffers of a rounded size, and writing a pass of a smaller size into them.

A CUDA graph has fixed shapes and addresses, while passes differ in size. So sizes are rounded up, one graph
serves all passes of a rounded size, and each pass is padded to it. The padding is a tail: rows of its own,
behind the last one, which have no adapter, and whose scored positions have no weight in the loss. All buffers
lie in one block of memory, so that one copy fills them.

Plain NumPy, with the same bytes on any machine. Refuses to know CUDA.

Shapes: T stream tokens, A scored positions, P prefix tokens, all as rounded.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora.lora.bank import AdapterBank
from qlora.lora.tables import (
    FULL_PROGRAMS,
    MOST_SIBLINGS,
    TILE_TOKENS,
    adds_pieces_later,
    has_odd_ranks,
    num_splits,
    padded_rank,
    pass_arrays,
)
from qlora.packed.stream import bounds_of, prefix_places, stretch_lengths
from qlora.passes import Pass

_ALIGNMENT_BYTES = 16
_MOST_WASTE = 1.3  # tokens of a size, over those of the size that a pass has by itself
# Of these a size may have more than a pass needs.
_ROOMS = (
    "rank",
    "odd_ranks",
    "has_dropout",
    "answers",
    "rows",
    "parts",
    "prefix_tokens",
    "longest_row",
    "longest_part",
    "longest_prefix",
    "longest",
)


@dataclass(frozen=True)
class PassSize:
    """The room that a recording has, and what its kernels are made for.

    tokens, answers, rows, parts, prefix_tokens: how many of each fit. longest_*: the tokens of the longest
    row, part and prefix that fit. longest: tokens of the longest row with its prefix, which matters to models
    with a sliding window. rank: the rank that kernels calculate with. odd_ranks: whether others than
    multiples of 8 fit. num_layers: linear layers that any adapter targets.
    """

    tokens: int
    answers: int
    rows: int
    parts: int
    prefix_tokens: int
    longest_row: int
    longest_part: int
    longest_prefix: int
    longest: int
    rank: int
    odd_ranks: bool
    num_layers: int
    has_dropout: bool
    is_training: bool

    @property
    def kernels(self) -> tuple[int, ...]:
        """Return what kernels are compiled for: sizes with equal values share compiled kernels."""
        made_for = (self.rank, self.odd_ranks, self.has_dropout, self.is_training, self.num_layers)
        dropouts = {False, self.has_dropout}
        have_pieces = [
            num_splits(self.num_tiles, 1 + more, one) > 1 for more in range(MOST_SIBLINGS) for one in dropouts
        ]
        return (*made_for, *have_pieces, adds_pieces_later(self.num_tiles), min(self.parts, FULL_PROGRAMS))

    @property
    def num_tiles(self) -> int:
        """Return the number of tiles that all parts may need: each part may fill its last one partly."""
        return -(-self.tokens // TILE_TOKENS) + self.parts

    @classmethod
    def of(cls, work: Pass, bank: AdapterBank) -> "PassSize":
        """Round a pass up to a size, which has 3 % more tokens on average."""
        layout = work.layout
        ranks = [one.settings.lora_r for one in work.adapters if one is not None]
        rows, in_parts, prefixes = stretch_lengths(layout.parts)
        num_tokens = layout.num_tokens
        num_prefix_tokens = int(prefixes.sum())
        prefix_tokens = _up_to(num_prefix_tokens, 64)
        tokens, answers = rounded_up(num_tokens, len(layout.targets_A), prefix_tokens - num_prefix_tokens)
        tail = tokens - num_tokens
        # Lengths of stretches are limits of a kernel's grid, where what is empty costs nearly nothing.
        longest_row = _power_of_2(max(int(rows.max()), tail, 1024))
        longest_prefix = _power_of_2(max(int(prefixes.max()), 64))
        has_window = getattr(bank.model.config.get_text_config(), "sliding_window", None) is not None
        return cls(
            tokens=tokens,
            answers=answers,
            rows=_up_to(len(rows) + 1, 32),
            parts=_power_of_2(len(in_parts)),
            prefix_tokens=prefix_tokens,
            longest_row=longest_row,
            longest_part=_power_of_2(max(int(in_parts.max()), tail, 4096)),
            longest_prefix=longest_prefix,
            longest=_up_to(layout.longest, 256) if has_window else longest_row + longest_prefix,
            rank=padded_rank(max(ranks)),
            odd_ranks=has_odd_ranks(ranks),
            num_layers=len(bank.layers),
            has_dropout=any(dropout is not None for dropout in work.dropouts),
            is_training=work.weights is not None,
        )

    def holds(self, work: Pass, own: "PassSize") -> bool:
        """Tell whether a pass fits into buffers of this size, too, with few tokens wasted.

        `own`: the size that the pass has by itself.
        """
        rows, _, prefixes = stretch_lengths(work.layout.parts)
        tail = self.tokens - work.layout.num_tokens
        made_alike = (self.num_layers, self.is_training) == (own.num_layers, own.is_training)
        return (
            made_alike
            and own.tokens <= self.tokens <= _MOST_WASTE * own.tokens
            and all(getattr(own, name) <= getattr(self, name) for name in _ROOMS)
            and tail <= min(self.longest_part, self.longest_row * (self.rows - len(rows)))
            and self.answers <= 2 * own.answers
            # What is left of the prefixes' places are the tail's, which has one prefix.
            and self.prefix_tokens - int(prefixes.sum()) <= min(tail, self.longest_prefix)
        )


def rounded_up(num_tokens: int, num_answers: int, num_padding: int = 0) -> tuple[int, int]:
    """Round the tokens and scored positions of a pass up to those that a recording has room for.

    `num_padding`: tokens that are needed besides, whatever the rounding.
    """
    grain = max(128, 2 ** (num_tokens.bit_length() - 5))
    tokens = _up_to(num_tokens + num_padding, grain)
    return tokens, _up_to(num_answers, tokens // 4)


def buffer_fields(size: PassSize) -> dict[str, tuple[Any, int, int]]:
    """Lay the buffers out in one block of memory: name -> (NumPy type, first byte, end)."""
    parts = size.parts + 1  # one more, for the tail, which has no adapter
    lengths = {
        "ids": (np.int64, size.tokens),
        "positions": (np.int64, size.tokens),
        "predictors": (np.int64, size.answers),
        "targets": (np.int64, size.answers),
        "places": (np.int64, size.prefix_tokens),
        "tiles": (np.int64, 3 * size.num_tiles),
        "bounds": (np.int64, 2 * parts),
        "limits": (np.int64, parts),
        "keys": (np.int64, size.tokens),
        "rows": (np.int32, size.rows + 1),
        "parts": (np.int32, parts + 1),
        "prefixes": (np.int32, parts + 1),
        "factors": (np.float32, parts),
        "weights": (np.float32, size.answers),
        "alone": (np.bool_, size.tokens),
    }
    fields = {}
    start = 0
    for name, (kind, length) in lengths.items():
        end = start + length * np.dtype(kind).itemsize
        fields[name] = (kind, start, end)
        start = _up_to(end, _ALIGNMENT_BYTES)
    return fields


def block_bytes(size: PassSize) -> int:
    """Return the number of bytes of a size's block."""
    end = max(end for _, _, end in buffer_fields(size).values())
    return _up_to(end, _ALIGNMENT_BYTES)


def buffer_views(size: PassSize, block: np.ndarray) -> dict[str, np.ndarray]:
    """Return the buffers of a block of bytes as arrays, by name."""
    return {name: block[start:end].view(kind) for name, (kind, start, end) in buffer_fields(size).items()}


def filled_block(size: PassSize, work: Pass) -> np.ndarray:
    """Write a pass that fits a size into a new block of bytes."""
    block = np.zeros(block_bytes(size), np.uint8)
    at = buffer_views(size, block)
    _fill_tokens(size, work, at)
    _fill_stretches(size, work, at)
    _fill_tables(size, work, at)
    return block


def _fill_tokens(size: PassSize, work: Pass, at: dict[str, np.ndarray]) -> None:
    """Write tokens and scored positions; the tail has positions of its own, from 0 on."""
    layout = work.layout
    num_tokens = layout.num_tokens
    num_answers = len(layout.targets_A)
    at["ids"][:num_tokens] = layout.ids_T
    at["positions"][:num_tokens] = layout.positions_T
    at["positions"][num_tokens:] = np.arange(size.tokens - num_tokens)
    at["predictors"][:num_answers] = layout.predictors_A
    # Unused answers are predicted from different places: in the backward, one place for all would be slow.
    at["predictors"][num_answers:] = np.arange(size.answers - num_answers)
    at["targets"][:num_answers] = layout.targets_A
    if work.weights is not None:
        at["weights"][:num_answers] = work.answer_weights()


def _fill_stretches(size: PassSize, work: Pass, at: dict[str, np.ndarray]) -> None:
    """Write the bounds of rows, parts and prefixes, and what the tail adds to them."""
    num_tokens = work.layout.num_tokens
    parts = work.layout.parts
    rows, in_parts, prefixes = (bounds_of(lengths) for lengths in stretch_lengths(parts))
    at["rows"][: len(rows)] = rows
    num_left = size.rows + 1 - len(rows)  # the tail is one row behind the last, or several if it is long
    at["rows"][len(rows) :] = np.minimum(
        num_tokens + size.longest_row * np.arange(1, num_left + 1), size.tokens
    )
    with_ends = (("parts", in_parts, size.tokens), ("prefixes", prefixes, size.prefix_tokens))
    for name, bounds, end in with_ends:
        at[name][: len(bounds)] = bounds
        at[name][len(bounds) :] = bounds[-1]  # parts that the pass does not have are empty
        at[name][-1] = end  # the tail is the last part, behind the empty ones
    places, alone = prefix_places(parts)
    at["places"][: len(places)] = places
    at["places"][len(places) :] = num_tokens + np.arange(size.prefix_tokens - len(places))
    at["alone"][:num_tokens] = alone
    at["alone"][num_tokens:] = True


def _fill_tables(size: PassSize, work: Pass, at: dict[str, np.ndarray]) -> None:
    """Write the tables of the LoRA kernels, with tiles for the tail, which is the last part."""
    spans = [(part.start, part.end) for part in work.layout.parts]
    tiles, bounds, limits, keys, factors = pass_arrays(spans, work.dropouts)
    starts = np.arange(work.layout.num_tokens, size.tokens, TILE_TOKENS)
    tail = np.stack([np.full_like(starts, size.parts), starts, np.full_like(starts, size.tokens)], 1)
    at["tiles"].reshape(-1, 3)[:, 0] = size.parts
    values = {
        "tiles": np.concatenate([tiles, tail.flatten()]),
        "bounds": bounds,
        "limits": limits,
        "keys": keys,
        "factors": factors,
    }
    for name, one in values.items():
        at[name][: len(one)] = one
    at["bounds"][-2:] = work.layout.num_tokens, size.tokens


def _up_to(count: int, grain: int) -> int:
    """Round up to a multiple of the grain."""
    return -(-count // grain) * grain


def _power_of_2(count: int) -> int:
    """Round up to a power of two."""
    return 1 << max(0, count - 1).bit_length()
