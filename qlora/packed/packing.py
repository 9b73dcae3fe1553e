"""Owns packing: from examples to groups that fit a token budget, and from groups to one stream.

A budget bounds the tokens of one pass, and with them its memory. Examples are sorted by length and cut into
groups; the prefix that all prompts of a group share is stored once, as in prefix caching for inference
(https://arxiv.org/abs/2312.07104). Groups of several trials may share a pass.

Refuses to know models.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qlora.data.prompts import EncodedExample
from qlora.packed.stream import Layout, PackedBatch, Part, Rows

FEWEST_PASS_TOKENS = 64  # below that, smaller passes are no remedy for out of memory


@dataclass(frozen=True)
class Group:
    """Examples that go through a model together, behind the prefix that their prompts share.

    prefix_length: tokens of that prefix. names: a number for each example, its place among the examples of
    its step; it is the same however the step is split into groups.
    """

    examples: tuple[EncodedExample, ...]
    prefix_length: int
    names: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Count the tokens that the group takes in a stream."""
        suffix_lengths = (example.num_tokens - self.prefix_length for example in self.examples)
        return self.prefix_length + sum(suffix_lengths)


def shared_prefix_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Count the tokens that all prompts begin with, at most all but one of the shortest prompt.

    Every prompt keeps a token of its own because the first answer token is predicted from its last one.
    """
    # All prompts lie between these two in lexicographic order, so what these two share, all share.
    first, last = min(prompts), max(prompts)
    shared = 0
    for first_token, last_token in zip(first, last, strict=False):
        if first_token != last_token:
            break
        shared += 1
    shortest = min(len(prompt) for prompt in prompts)
    return min(shared, shortest - 1)


def pack(examples: Sequence[EncodedExample], device: torch.device | str = "cpu") -> PackedBatch:
    """Pack all examples, in their order, into a PackedBatch of one part.

    Every example must have a prompt token and an answer token.
    """
    return pack_groups([whole_group(examples)], device)


def whole_group(examples: Sequence[EncodedExample]) -> Group:
    """Return all examples as one group."""
    return Group(
        examples=tuple(examples),
        prefix_length=shared_prefix_length([example.prompt for example in examples]),
        names=tuple(range(len(examples))),
    )


def lay_out(groups: Sequence[Group], device: torch.device | str = "cpu") -> Layout:
    """Lay groups out as a stream on the host, a part for each group.

    `device` is where the tensors that parts compute of themselves will be used.
    """
    device = torch.device(device)
    ids: list[int] = []
    positions: list[np.ndarray] = []
    predictors: list[np.ndarray] = []
    answer_lengths_N: list[int] = []
    parts: list[Part] = []
    for group in groups:
        p = group.prefix_length
        start = len(ids)
        ids += group.examples[0].prompt[:p]
        positions.append(np.arange(p))
        for example in group.examples:
            assert p < len(example.prompt) and example.answer, (
                "every example needs a prompt token of its own and an answer"
            )
            ids += example.prompt[p:]
            ids += example.answer
            positions.append(np.arange(p, example.num_tokens))
            behind = len(ids) - len(example.answer) - 1
            scored = np.arange(len(example.answer)) if example.scored is None else np.array(example.scored)
            predictors.append(behind + scored)
            answer_lengths_N.append(example.num_scored)
        prefix = Rows((p,), 0, device)
        suffixes = Rows(tuple(example.num_tokens - p for example in group.examples), p, device)
        parts.append(Part(start, prefix, suffixes))
    ids_T = np.array(ids)
    predictors_A = np.concatenate(predictors)
    return Layout(
        ids_T=ids_T,
        positions_T=np.concatenate(positions),
        predictors_A=predictors_A,
        targets_A=ids_T[predictors_A + 1],
        rows_A=np.repeat(np.arange(len(answer_lengths_N)), answer_lengths_N),
        parts=tuple(parts),
        num_answers=tuple(sum(one.num_scored for one in group.examples) for group in groups),
    )


def pack_groups(groups: Sequence[Group], device: torch.device | str = "cpu") -> PackedBatch:
    """Pack groups into a PackedBatch with a part for each group."""
    return on_device(lay_out(groups, device), device)


def on_device(layout: Layout, device: torch.device | str) -> PackedBatch:
    """Move a layout to a device, in one copy."""
    arrays = (layout.ids_T, layout.positions_T, layout.predictors_A, layout.targets_A)
    whole = torch.from_numpy(np.concatenate(arrays)).to(device)
    ids_T, positions_T, predictors_A, targets_A = whole.split([len(array) for array in arrays])
    return PackedBatch(
        input_ids_T=ids_T,
        position_ids_T=positions_T,
        predictors_A=predictors_A,
        targets_A=targets_A,
        parts=layout.parts,
        longest=layout.longest,
    )


def split_by_budget(examples: Sequence[EncodedExample], budget_tokens: int) -> list[Group]:
    """Split examples into groups whose streams fit the budget, each behind the prefix that all share.

    An example's name is its index. The longest come first, so that rows of a group are of similar length, and
    the first group has the longest row of all. A single example larger than the budget is a group of its own.
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
    return [
        Group(examples=tuple(examples[index] for index in names), prefix_length=prefix, names=tuple(names))
        for names in groups
    ]


def next_pass(queues: Sequence[deque[Group]], budget_tokens: int) -> tuple[list[int], list[Group]]:
    """Take at most one group off each queue, as long as they fit the budget together.

    Returns the indices of the queues that a group was taken from, and the groups. The first group is taken
    whatever its size, so that every call makes progress.
    """
    owners: list[int] = []
    groups: list[Group] = []
    num_tokens = 0
    for owner, queue in enumerate(queues):
        if queue and (not groups or num_tokens + queue[0].num_tokens <= budget_tokens):
            groups.append(queue.popleft())
            owners.append(owner)
            num_tokens += groups[-1].num_tokens
    return owners, groups
