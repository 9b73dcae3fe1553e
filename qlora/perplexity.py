"""Owns the metric: public perplexity, the mean over examples of exp(mean NLL of the answer tokens and EOS).

Each example counts once, however long its answer, and its value does not depend on what it was batched with.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora.bank import Adapter, AdapterBank
from qlora.packing import Group, PackedBatch, next_pass, pack_groups, split_by_budget
from qlora.prompts import EncodedExample

_LOGIT_ROWS = 64  # without gradients, so many rows of logits at a time become probabilities: float32 copies stay in cache


def answer_nll(model: Any, batch: PackedBatch) -> Tensor:
    """Negative log-likelihood in nats of every answer token: [A], float32. Logits exist at scored positions only."""
    logits_AV = model(input_ids=batch.input_ids_T[None], position_ids=batch.position_ids_T[None], packed=batch, use_cache=False,
                      logits_to_keep=batch.predictors_A).logits[0]
    if torch.is_grad_enabled():
        return F.cross_entropy(logits_AV.float(), batch.targets_A, reduction="none")
    parts = zip(logits_AV.split(_LOGIT_ROWS), batch.targets_A.split(_LOGIT_ROWS), strict=True)
    return torch.cat([logits.float().logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0].float() for logits, targets in parts])


def example_perplexities(model: Any, examples: Sequence[EncodedExample], budget_tokens: int,
                         progress: Callable[[int, int], None] = lambda done, total: None) -> list[float]:
    """Perplexity of each example, in their order.

    `model` has packed attention (see qlora.attention) and is put in eval mode. `budget_tokens` is what a training
    pass may hold; an evaluation keeps no activations and takes four times as much. `progress(done, total)` is called after each.
    """
    model.eval()
    device = next(model.parameters()).device

    def score(groups: Sequence[Group], owners: Sequence[int]) -> tuple[PackedBatch, Tensor]:
        batch = pack_groups(groups, device)
        return batch, answer_nll(model, batch)
    return score_together([examples], budget_tokens, score, progress)[0]


def adapter_perplexities(bank: AdapterBank, requests: Sequence[tuple[Adapter | None, Sequence[EncodedExample]]],
                         budget_tokens: int) -> list[list[float]]:
    """Perplexity of each example under each request's adapter (None: the bare base), all requests in passes that they share."""
    def score(groups: Sequence[Group], owners: Sequence[int]) -> tuple[PackedBatch, Tensor]:
        batch = pack_groups(groups, bank.device)
        with bank.routed(batch, [requests[owner][0] for owner in owners], [None] * len(owners)):
            return batch, answer_nll(bank.model, batch)
    return score_together([examples for _, examples in requests], budget_tokens, score)


@torch.no_grad()
def score_together(requests: Sequence[Sequence[EncodedExample]], budget_tokens: int,
                   score: Callable[[Sequence[Group], Sequence[int]], tuple[PackedBatch, Tensor]],
                   progress: Callable[[int, int], None] = lambda done, total: None) -> list[list[float]]:
    """Perplexities of several requests' examples. `score` runs one pass over groups, each with the request that it belongs to."""
    values = [[0.0] * len(examples) for examples in requests]
    queues = [deque(split_by_budget(examples, 4 * budget_tokens)) for examples in requests]
    done, total = 0, sum(map(len, requests))
    while any(queues):
        owners, groups = next_pass(queues, 4 * budget_tokens)
        batch, nll_A = score(groups, owners)
        rows = batch.num_rows
        sums_N = torch.zeros(rows, dtype=torch.float64, device=nll_A.device).index_add_(0, batch.examples_A, nll_A.double())
        found = iter((sums_N / batch.examples_A.bincount(minlength=rows)).exp().tolist())
        for owner, group in zip(owners, groups, strict=True):
            for name in group.names:
                values[owner][name] = next(found)
        done += rows
        progress(done, total)
    return values


def mean_perplexity(perplexities: Sequence[float]) -> float:
    """The mean over examples."""
    return sum(perplexities) / len(perplexities)
