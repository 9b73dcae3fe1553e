"""Owns packing: examples -> groups that fit a budget -> one stream (qlora.packed.stream), the prefix that their prompts share stored once.

Refuses to know models.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qlora.data.prompts import EncodedExample
from qlora.packed.stream import Layout, PackedBatch, Part, Rows

FEWEST_PASS_TOKENS = 64  # of a pass: below that, out of memory is not a matter of passes


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


def shared_prefix_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with, leaving every prompt at least one token of its own: the first answer token is
    predicted from that one."""
    # in lexicographic order, what these two share, all share
    first, last = min(prompts), max(prompts)
    shared = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )
    return min(shared, min(map(len, prompts)) - 1)


def pack(examples: Sequence[EncodedExample], device: torch.device | str = "cpu") -> PackedBatch:
    """One PackedBatch of all examples, in their order, behind all that their prompts share. Every example must have a prompt and an
    answer token."""
    return pack_groups([whole_group(examples)], device)


def whole_group(examples: Sequence[EncodedExample]) -> Group:
    """All examples as one group."""
    return Group(
        tuple(examples),
        shared_prefix_length([example.prompt for example in examples]),
        tuple(range(len(examples))),
    )


def lay_out(groups: Sequence[Group], device: torch.device | str = "cpu") -> Layout:
    """A part for each group. `device`: where what parts hold will be used."""
    device = torch.device(device)
    ids: list[int] = []
    positions, predictors = [], []
    parts, num_answers, answers_N = [], [], []
    for group in groups:
        p, start = group.prefix_length, len(ids)
        ids += group.examples[0].prompt[:p]
        positions.append(np.arange(p))
        for example in group.examples:
            assert p < len(example.prompt) and example.answer, (
                "every example needs a prompt token of its own and an answer"
            )
            ids += example.prompt[p:]
            ids += example.answer
            positions.append(np.arange(p, example.num_tokens))
            predictors.append(np.arange(len(ids) - len(example.answer) - 1, len(ids) - 1))
            answers_N.append(len(example.answer))
        lengths = tuple(example.num_tokens - p for example in group.examples)
        parts.append(Part(start, Rows((p,), 0, device), Rows(lengths, p, device)))
        num_answers.append(sum(answers_N[len(answers_N) - len(group.examples) :]))
    ids_T, predictors_A = np.array(ids), np.concatenate(predictors)
    return Layout(
        ids_T,
        np.concatenate(positions),
        predictors_A,
        ids_T[predictors_A + 1],
        np.repeat(np.arange(len(answers_N)), answers_N),
        tuple(parts),
        tuple(num_answers),
    )


def pack_groups(groups: Sequence[Group], device: torch.device | str = "cpu") -> PackedBatch:
    """One PackedBatch with a part for each group."""
    return on_device(lay_out(groups, device), device)


def on_device(layout: Layout, device: torch.device | str) -> PackedBatch:
    """A layout's batch, moved in one copy."""
    arrays = (layout.ids_T, layout.positions_T, layout.predictors_A, layout.targets_A)
    whole = torch.from_numpy(np.concatenate(arrays)).to(device)
    ids_T, positions_T, predictors_A, targets_A = whole.split([len(array) for array in arrays])
    return PackedBatch(ids_T, positions_T, predictors_A, targets_A, layout.parts, layout.longest)


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
