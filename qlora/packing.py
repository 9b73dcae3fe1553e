"""Owns the packed stream: examples -> one PackedBatch of token ids without padding, the shared prefix stored once.

Shapes: T stream tokens, P prefix tokens, N examples (rows), L longest suffix, A scored (answer) positions.

    stream:     prefix | suffix of example 0 | suffix of example 1 | ... | suffix of example N-1
    positions:  0..P-1 | P..                 | P..                 |     | P..

A suffix token attends to the whole prefix and, causally, to its own suffix: exactly what it would see in a padded row.
Position A's predictor is the stream token before it. Refuses to know models and attention kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from qlora.prompts import EncodedExample


@dataclass(frozen=True)
class PackedBatch:
    """One forward pass's work.

    input_ids_T and position_ids_T: the stream. row_slots_S: for each of the S = T - P suffix tokens its slot in a padded
    [N * L] grid, the layout that attention uses. predictors_A: stream index whose logits predict the answer token
    targets_A, which belongs to example examples_A.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    row_slots_S: torch.Tensor
    predictors_A: torch.Tensor
    targets_A: torch.Tensor
    examples_A: torch.Tensor
    prefix_length: int
    num_rows: int
    row_length: int

    @property
    def num_tokens(self) -> int:
        """Stream tokens T."""
        return self.input_ids_T.numel()

    @cached_property
    def _masks(self) -> dict[int | None, torch.Tensor]:
        return {}

    def suffix_mask(self, sliding_window: int | None) -> torch.Tensor:
        """[L, P + L] bool, true where a suffix token may look. Rows shorter than L need no mask of their own: what pads a
        row comes after its tokens, so causality hides it."""
        if sliding_window not in self._masks:
            device, p, n = self.input_ids_T.device, self.prefix_length, self.row_length
            distance = torch.arange(p, p + n, device=device)[:, None] - torch.arange(p + n, device=device)[None]
            self._masks[sliding_window] = (distance >= 0) if sliding_window is None else (distance >= 0) & (distance < sliding_window)
        return self._masks[sliding_window]


def shared_prefix_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with, leaving every prompt at least one token of its own: the first answer token is
    predicted from that one."""
    first, last = min(prompts), max(prompts)  # in lexicographic order, what these two share, all share
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(shared, min(map(len, prompts)) - 1)


def pack(examples: Sequence[EncodedExample], device: torch.device | str = "cpu") -> PackedBatch:
    """One PackedBatch of all examples, in their order. Every example must have a prompt and an answer token."""
    assert examples and all(example.prompt and example.answer for example in examples)
    prefix = examples[0].prompt[:shared_prefix_length([example.prompt for example in examples])]
    p, row_length = len(prefix), max(example.num_tokens for example in examples) - len(prefix)
    ids, positions = list(prefix), list(range(p))
    slots: list[int] = []
    predictors: list[int] = []
    owners: list[int] = []
    for row, example in enumerate(examples):
        suffix = (*example.prompt[p:], *example.answer)
        ids += suffix
        positions += range(p, p + len(suffix))
        slots += range(row * row_length, row * row_length + len(suffix))
        predictors += range(len(ids) - len(example.answer) - 1, len(ids) - 1)
        owners += [row] * len(example.answer)
    stream, predictors_A = torch.tensor(ids), torch.tensor(predictors)
    return PackedBatch(
        input_ids_T=stream.to(device), position_ids_T=torch.tensor(positions, device=device),
        row_slots_S=torch.tensor(slots, device=device), predictors_A=predictors_A.to(device),
        targets_A=stream[predictors_A + 1].to(device), examples_A=torch.tensor(owners, device=device),
        prefix_length=p, num_rows=len(examples), row_length=row_length)


def split_by_budget(examples: Sequence[EncodedExample], budget_tokens: int) -> list[list[int]]:
    """Indices of `examples` in groups whose padded attention grid (prefix + rows of the longest suffix) fits the budget.

    Longest first, so that rows of a group are of like length and the first group is the largest: what fits once, fits. A
    single example larger than the budget is a group of its own.
    """
    if not examples:
        return []
    prefix = shared_prefix_length([example.prompt for example in examples])
    order = sorted(range(len(examples)), key=lambda i: (-examples[i].num_tokens, i))
    groups: list[list[int]] = []
    for index in order:
        group = groups[-1] if groups else []
        if group and prefix + (len(group) + 1) * (examples[group[0]].num_tokens - prefix) <= budget_tokens:
            group.append(index)
        else:
            groups.append([index])
    return groups
