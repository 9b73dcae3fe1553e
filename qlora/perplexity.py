"""Owns the metric: public perplexity, the mean over examples of exp(mean NLL of the answer tokens and EOS).

Each example counts once, however long its answer, and its value does not depend on what it was batched with.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.data.prompts import EncodedExample
from qlora.lora.bank import Adapter, AdapterBank
from qlora.packed.packing import Group, lay_out, next_pass, on_device, split_by_budget
from qlora.packed.stream import Layout
from qlora.passes import answer_nll, run_pass


def example_perplexities(
    model: Any,
    examples: Sequence[EncodedExample],
    budget_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """Perplexity of each example, in their order.

    `model` has packed attention (see qlora.packed.attention) and is put in eval mode. `budget_tokens` is what a training
    pass may hold; an evaluation keeps no activations and takes four times as much. `progress(done, total)` is called after each.
    """
    model.eval()
    device = next(model.parameters()).device

    def score(groups: Sequence[Group], owners: Sequence[int]) -> tuple[Layout, Tensor]:
        layout = lay_out(groups, device)
        return layout, answer_nll(model, on_device(layout, device))

    return score_together([examples], budget_tokens, score, progress)[0]


def adapter_perplexities(
    bank: AdapterBank, requests: Sequence[tuple[Adapter | None, Sequence[EncodedExample]]], budget_tokens: int
) -> list[list[float]]:
    """Perplexity of each example under each request's adapter (None: the bare base), all requests in passes that they share."""

    def score(groups: Sequence[Group], owners: Sequence[int]) -> tuple[Layout, Tensor]:
        return run_pass(bank, groups, [requests[owner][0] for owner in owners], [None] * len(owners))

    return score_together([examples for _, examples in requests], budget_tokens, score)


@torch.no_grad()
def score_together(
    requests: Sequence[Sequence[EncodedExample]],
    budget_tokens: int,
    score: Callable[[Sequence[Group], Sequence[int]], tuple[Layout, Tensor]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[float]]:
    """Perplexities of several requests' examples. `score` runs one pass over groups, each with the request that it belongs to."""
    values = [[0.0] * len(examples) for examples in requests]
    queues = [deque(split_by_budget(examples, 4 * budget_tokens)) for examples in requests]
    done, total = 0, sum(map(len, requests))
    while any(queues):
        owners, groups = next_pass(queues, 4 * budget_tokens)
        layout, nll_A = score(groups, owners)
        found = iter(np.exp(layout.row_means(nll_A.cpu().numpy())).tolist())
        for owner, group in zip(owners, groups, strict=True):
            for name in group.names:
                values[owner][name] = next(found)
        done += layout.num_rows
        progress(done, total)
    return values


def mean_perplexity(perplexities: Sequence[float]) -> float:
    """The mean over examples."""
    return sum(perplexities) / len(perplexities)
