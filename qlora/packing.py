"""Owns the packed stream: examples -> one PackedBatch of token ids without padding, the shared prefix stored once.

Shapes: T stream tokens, P prefix tokens, N examples (rows) or rows of a bucket, L a bucket's longest suffix, B a bucket's
tokens, A scored (answer) positions.

    part:       prefix | suffix of example 0 | suffix of example 1 | ... | suffix of example N-1
    positions:  0..P-1 | P..                 | P..                 |     | P..

A suffix token attends to the whole prefix and, causally, to its own suffix: exactly what it would see in a padded row.
Position A's predictor is the stream token before it. A stream has one part, or one a trial: trials' prefixes read alike, but
their adapters make different keys of them. Refuses to know models and attention kernels.
"""

import itertools
from collections import deque
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
            distance = (torch.arange(p, p + row_length, device=self.device)[:, None]
                        - torch.arange(p + row_length, device=self.device)[None])
            self._masks[key] = (distance >= 0) if sliding_window is None else (distance >= 0) & (distance < sliding_window)
        return self._masks[key]


@dataclass(frozen=True)
class Group:
    """Examples that go through a model together, behind the first `prefix_length` tokens, which their prompts share.

    names: what each example is called in its step; the same example has the same name however a step is split.
    """

    examples: tuple[EncodedExample, ...]
    prefix_length: int
    names: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Stream tokens."""
        return self.prefix_length + sum(example.num_tokens - self.prefix_length for example in self.examples)


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
class PackedBatch:
    """One forward pass's work.

    input_ids_T and position_ids_T: the stream, part behind part. predictors_A: stream index whose logits predict the answer
    token targets_A, which belongs to row examples_A, counted through all parts. num_answers: scored positions of each part.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    parts: tuple[Part, ...]
    predictors_A: torch.Tensor
    targets_A: torch.Tensor
    examples_A: torch.Tensor
    num_answers: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Stream tokens T."""
        return self.input_ids_T.numel()

    @property
    def prefix_length(self) -> int:
        """Tokens P of the first part's prefix."""
        return self.parts[0].prefix.num_tokens

    @property
    def num_rows(self) -> int:
        """Examples N of all parts."""
        return sum(len(part.suffixes.lengths) for part in self.parts)

    @cached_property
    def rows(self) -> Rows:
        """Prefixes and suffixes of all parts as rows behind nothing."""
        lengths = [length for part in self.parts for length in (*part.prefix.lengths, *part.suffixes.lengths) if length]
        return Rows(tuple(lengths), 0, self.input_ids_T.device)

    @cached_property
    def prefixed(self) -> "Prefixed":
        """Which tokens look at which prefixes; parts without a prefix are left out."""
        device, parts = self.input_ids_T.device, [part for part in self.parts if part.prefix.num_tokens]
        return Prefixed(_places([(part.suffix_start, part.end) for part in parts], device),
                        _places([(part.start, part.suffix_start) for part in parts], device),
                        Rows(tuple(part.suffixes.num_tokens for part in parts), 0, device),
                        Rows(tuple(part.prefix.num_tokens for part in parts), 0, device))


@dataclass(frozen=True)
class Prefixed:
    """The tokens behind prefixes and the tokens of prefixes, as places in the stream (a slice if they are side by side), and how
    many of each belong to each part."""

    suffix_places: torch.Tensor | slice
    prefix_places: torch.Tensor | slice
    suffixes: Rows
    prefixes: Rows


def shared_prefix_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with, leaving every prompt at least one token of its own: the first answer token is
    predicted from that one."""
    first, last = min(prompts), max(prompts)  # in lexicographic order, what these two share, all share
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(shared, min(map(len, prompts)) - 1)


def pack(examples: Sequence[EncodedExample], device: torch.device | str = "cpu") -> PackedBatch:
    """One PackedBatch of all examples, in their order, behind all that their prompts share. Every example must have a prompt and an
    answer token."""
    return pack_groups([whole_group(examples)], device)


def whole_group(examples: Sequence[EncodedExample]) -> Group:
    """All examples as one group."""
    return Group(tuple(examples), shared_prefix_length([example.prompt for example in examples]), tuple(range(len(examples))))


def pack_groups(groups: Sequence[Group], device: torch.device | str = "cpu") -> PackedBatch:
    """One PackedBatch with a part for each group."""
    device = torch.device(device)
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    owners: list[int] = []
    parts, num_answers, row = [], [], 0
    for group in groups:
        p, start, before = group.prefix_length, len(ids), len(predictors)
        ids += group.examples[0].prompt[:p]
        positions += range(p)
        for example in group.examples:
            assert p < len(example.prompt) and example.answer, "every example needs a prompt token of its own and an answer"
            suffix = (*example.prompt[p:], *example.answer)
            ids += suffix
            positions += range(p, p + len(suffix))
            predictors += range(len(ids) - len(example.answer) - 1, len(ids) - 1)
            owners += [row] * len(example.answer)
            row += 1
        lengths = tuple(example.num_tokens - p for example in group.examples)
        parts.append(Part(start, Rows((p,), 0, device), Rows(lengths, p, device)))
        num_answers.append(len(predictors) - before)
    whole = torch.tensor([ids, positions])
    scored = torch.tensor([predictors, owners, [ids[place + 1] for place in predictors]])
    (ids_T, positions_T), (predictors_A, owners_A, targets_A) = whole.to(device), scored.to(device)
    return PackedBatch(ids_T, positions_T, tuple(parts), predictors_A, targets_A, owners_A, tuple(num_answers))


def _places(ranges: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor | slice:
    if len(ranges) == 1:
        return slice(*ranges[0])
    return torch.tensor([place for start, end in ranges for place in range(start, end)], device=device)


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


def split_by_budget(examples: Sequence[EncodedExample], budget_tokens: int) -> list[Group]:
    """`examples` in groups whose streams fit the budget, each behind the prefix that all of them share; an example's name is its
    index.

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
    return [Group(tuple(examples[index] for index in group), prefix, tuple(group)) for group in groups]


def next_pass(queues: Sequence[deque[Group]], budget_tokens: int) -> tuple[list[int], list[Group]]:
    """Take at most one group off each queue, as long as they fit the budget together: (the queues' indices, the groups)."""
    owners: list[int] = []
    groups: list[Group] = []
    num_tokens = 0
    for owner, queue in enumerate(queues):
        if queue and (not groups or num_tokens + queue[0].num_tokens <= budget_tokens):
            groups.append(queue.popleft())
            owners.append(owner)
            num_tokens += groups[-1].num_tokens
    return owners, groups
