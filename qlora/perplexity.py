"""Owns the metric: public perplexity, the mean over examples of exp(mean NLL of the answer tokens and EOS).

Each example counts once, however long its answer, and its value does not depend on what it was batched with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora.packing import PackedBatch, pack, split_by_budget
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


@torch.no_grad()
def example_perplexities(model: Any, examples: Sequence[EncodedExample], budget_tokens: int,
                         progress: Callable[[int, int], None] = lambda done, total: None) -> list[float]:
    """Perplexity of each example, in their order.

    `model` has packed attention (see qlora.attention) and is put in eval mode. `budget_tokens` is what a training
    pass may hold; an evaluation keeps no activations and takes four times as much. `progress(done, total)` is called after each.
    """
    model.eval()
    device = next(model.parameters()).device
    values, done = [0.0] * len(examples), 0
    for group in split_by_budget(examples, 4 * budget_tokens):
        batch = pack([examples[index] for index in group], device)
        nll_A = answer_nll(model, batch).double()
        sums_N = torch.zeros(batch.num_rows, dtype=torch.float64, device=device).index_add_(0, batch.examples_A, nll_A)
        for index, perplexity in zip(group, (sums_N / batch.examples_A.bincount(minlength=batch.num_rows)).exp().tolist(), strict=True):
            values[index] = perplexity
        done += len(group)
        progress(done, len(examples))
    return values


def mean_perplexity(perplexities: Sequence[float]) -> float:
    """The mean over examples."""
    return sum(perplexities) / len(perplexities)
