"""Owns the metric: public perplexity, the mean over examples of exp(mean NLL of the answer tokens and EOS).

Perplexity is the number of equally likely tokens among which a model is as unsure. Each example counts once,
however long its answer, and its value does not depend on what it was batched with.

Refuses to know training.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.answer_nll import answer_nll
from qlora.data.prompts import EncodedExample
from qlora.lora.bank import Adapter, AdapterBank
from qlora.packed.packing import FEWEST_PASS_TOKENS, Group, lay_out, next_pass, on_device, split_by_budget
from qlora.packed.stream import Layout
from qlora.passes import run_pass

_EVALUATION_PASSES = 4  # an evaluation keeps no activations, so its passes hold four times what training's do
Shrink = Callable[[int], int | None]  # from a budget that ran out of memory to a smaller one, if there is any


def halved(budget_tokens: int) -> int | None:
    """Free a GPU's cached memory and return half of a budget, or None if the half is too small for a pass."""
    torch.cuda.empty_cache()
    return budget_tokens // 2 if budget_tokens >= 2 * FEWEST_PASS_TOKENS else None


def example_perplexities(
    model: Any,
    examples: Sequence[EncodedExample],
    budget_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """Measure the perplexity of each example, in their order.

    `model` must have packed attention (qlora.packed.attention) and is put in eval mode. `budget_tokens` is
    what a training pass may hold. `progress(done, total)` is called after each pass.
    """
    model.eval()
    device = next(model.parameters()).device

    def score(groups: Sequence[Group], owners: Sequence[int]) -> tuple[Layout, Tensor]:
        layout = lay_out(groups, device)
        return layout, answer_nll(model, on_device(layout, device))

    return score_together([examples], budget_tokens, score, progress)[0]


def adapter_perplexities(
    bank: AdapterBank,
    requests: Sequence[tuple[Adapter | None, Sequence[EncodedExample]]],
    budget_tokens: int,
    shrink: Shrink = halved,
) -> list[list[float]]:
    """Measure each example's perplexity under its request's adapter, in passes that requests share.

    A request is an adapter (None: the bare base) and its examples. `budget_tokens` is what a training pass
    may hold.
    """

    def score(groups: Sequence[Group], owners: Sequence[int]) -> tuple[Layout, Tensor]:
        adapters = [requests[owner][0] for owner in owners]
        return run_pass(bank, groups, adapters, dropouts=[None] * len(owners))

    return score_together([examples for _, examples in requests], budget_tokens, score, shrink=shrink)


@torch.no_grad()
def score_together(
    requests: Sequence[Sequence[EncodedExample]],
    budget_tokens: int,
    score: Callable[[Sequence[Group], Sequence[int]], tuple[Layout, Tensor]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    shrink: Shrink = halved,
) -> list[list[float]]:
    """Measure the perplexities of several requests' examples.

    `score` runs one pass over groups, given the index of each group's request. If it runs out of memory, what
    is not scored yet is scored in smaller passes, whose budget `shrink` gives. Raises
    torch.cuda.OutOfMemoryError if it gives none.
    """
    values: list[dict[int, float]] = [{} for _ in requests]
    queues = [deque(split_by_budget(examples, _EVALUATION_PASSES * budget_tokens)) for examples in requests]
    total = sum(map(len, requests))
    while any(queues):
        owners, groups = next_pass(queues, _EVALUATION_PASSES * budget_tokens)
        try:
            layout, nll_A = score(groups, owners)
            means = np.exp(layout.row_means(nll_A.cpu().numpy())).tolist()
        except torch.cuda.OutOfMemoryError:
            smaller = shrink(budget_tokens)
            if smaller is None:
                raise
            budget_tokens = smaller
            queues = [
                deque(_unscored(examples, done, _EVALUATION_PASSES * budget_tokens))
                for examples, done in zip(requests, values, strict=True)
            ]
            continue
        found = iter(means)
        for owner, group in zip(owners, groups, strict=True):
            values[owner].update((name, next(found)) for name in group.names)
        progress(sum(map(len, values)), total)
    return [[done[index] for index in range(len(done))] for done in values]


def mean_perplexity(perplexities: Sequence[float]) -> float:
    """Return the mean over examples, which is the public perplexity."""
    return sum(perplexities) / len(perplexities)


def _unscored(examples: Sequence[EncodedExample], done: dict[int, float], budget_tokens: int) -> list[Group]:
    """Split the examples that are not scored into groups, whose names are places among all examples."""
    left = [index for index in range(len(examples)) if index not in done]
    groups = split_by_budget([examples[index] for index in left], budget_tokens)
    return [replace(group, names=tuple(left[name] for name in group.names)) for group in groups]
