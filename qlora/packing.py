"""Owns the packed stream: examples -> one PackedBatch of token ids without padding, the shared prefix stored once.

Shapes: T stream tokens, P prefix tokens, N examples (rows) or rows of a bucket, L a bucket's longest suffix, B a bucket's
tokens, A scored (answer) positions.

    stream:     prefix | suffix of example 0 | suffix of example 1 | ... | suffix of example N-1
    positions:  0..P-1 | P..                 | P..                 |     | P..

A suffix token attends to the whole prefix and, causally, to its own suffix: exactly what it would see in a padded row.
Position A's predictor is the stream token before it. Refuses to know models and attention kernels.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from qlora.prompts import EncodedExample


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
    def outer_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The bounds of all rows as one, and of the prefix: [2] int32 each."""
        return tuple(torch.tensor([0, end], dtype=torch.int32, device=self.device)  # type: ignore[return-value]
                     for end in (self.num_tokens, self.prefix_length))

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
            distance = (torch.arange(p, p + row_length, device=self.device)[:, None]
                        - torch.arange(p + row_length, device=self.device)[None])
            self._masks[key] = (distance >= 0) if sliding_window is None else (distance >= 0) & (distance < sliding_window)
        return self._masks[key]


@dataclass(frozen=True)
class PackedBatch:
    """One forward pass's work.

    input_ids_T and position_ids_T: the stream. prefix: one row behind nothing. suffixes: the other rows, behind the prefix.
    predictors_A: stream index whose logits predict the answer token targets_A, which belongs to example examples_A.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    prefix: Rows
    suffixes: Rows
    predictors_A: torch.Tensor
    targets_A: torch.Tensor
    examples_A: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Stream tokens T."""
        return self.input_ids_T.numel()

    @property
    def prefix_length(self) -> int:
        """Tokens P of the shared prefix."""
        return self.suffixes.prefix_length

    @property
    def num_rows(self) -> int:
        """Examples N."""
        return len(self.suffixes.lengths)


def shared_prefix_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with, leaving every prompt at least one token of its own: the first answer token is
    predicted from that one."""
    first, last = min(prompts), max(prompts)  # in lexicographic order, what these two share, all share
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(shared, min(map(len, prompts)) - 1)


def pack(examples: Sequence[EncodedExample], device: torch.device | str = "cpu") -> PackedBatch:
    """One PackedBatch of all examples, in their order. Every example must have a prompt and an answer token."""
    assert examples and all(example.prompt and example.answer for example in examples)
    device = torch.device(device)
    prefix = examples[0].prompt[:shared_prefix_length([example.prompt for example in examples])]
    p = len(prefix)
    ids, positions = list(prefix), list(range(p))
    predictors: list[int] = []
    owners: list[int] = []
    for row, example in enumerate(examples):
        suffix = (*example.prompt[p:], *example.answer)
        ids += suffix
        positions += range(p, p + len(suffix))
        predictors += range(len(ids) - len(example.answer) - 1, len(ids) - 1)
        owners += [row] * len(example.answer)
    stream, predictors_A = torch.tensor(ids), torch.tensor(predictors)
    return PackedBatch(
        input_ids_T=stream.to(device), position_ids_T=torch.tensor(positions, device=device),
        prefix=Rows((p,), 0, device), suffixes=Rows(tuple(example.num_tokens - p for example in examples), p, device),
        predictors_A=predictors_A.to(device), targets_A=stream[predictors_A + 1].to(device),
        examples_A=torch.tensor(owners, device=device))


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


def split_by_budget(examples: Sequence[EncodedExample], budget_tokens: int) -> list[list[int]]:
    """Indices of `examples` in groups whose streams (shared prefix + suffixes) fit the budget.

    Longest first, so that rows of a group are of like length, and the first group's longest row is the longest of all. A
    single example larger than the budget is a group of its own.
    """
    if not examples:
        return []
    prefix = shared_prefix_length([example.prompt for example in examples])
    order = sorted(range(len(examples)), key=lambda i: (-examples[i].num_tokens, i))
    groups: list[list[int]] = []
    num_tokens = 0
    for index in order:
        suffix = examples[index].num_tokens - prefix
        if not groups or num_tokens + suffix > budget_tokens:
            groups.append([])
            num_tokens = prefix
        groups[-1].append(index)
        num_tokens += suffix
    return groups
