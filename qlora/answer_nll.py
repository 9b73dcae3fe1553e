"""Owns the loss of a packed batch: the negative log-likelihood (NLL) of every answer token.

Only answer tokens are scored, as usual in instruction tuning, so the head computes logits only where it
predicts one: with long prompts that saves most of its work and memory.

Refuses to know adapters.

Shapes: A scored positions, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora.packed.attention import packed_logits
from qlora.packed.stream import PackedBatch

# Rows of logits that are converted to float32 at a time: on a CPU so many that the copies stay in the cache;
# on a GPU, where each piece is a handful of launches, as many as have so many numbers.
_CPU_ROWS, _GPU_NUMBERS = 64, 2**24


def answer_nll(model: Any, batch: PackedBatch) -> Tensor:
    """Return the negative log-likelihood in nats of every answer token: [A], float32.

    `model` must have packed attention (qlora.packed.attention).
    """
    logits_AV = packed_logits(model, batch)
    if torch.is_grad_enabled():
        return F.cross_entropy(logits_AV.float(), batch.targets_A, reduction="none")
    rows = max(_CPU_ROWS, _GPU_NUMBERS // logits_AV.shape[1]) if logits_AV.is_cuda else _CPU_ROWS
    pieces = zip(logits_AV.split(rows), batch.targets_A.split(rows), strict=True)
    return torch.cat([_nll(logits, targets) for logits, targets in pieces])


def _nll(logits_AV: Tensor, targets_A: Tensor) -> Tensor:
    """Compute the NLL of targets without gradients: log-sum-exp of the logits minus the target's logit."""
    scored_A = logits_AV.gather(1, targets_A[:, None])[:, 0]
    return logits_AV.float().logsumexp(-1) - scored_A.float()
