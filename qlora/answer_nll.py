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

_LOGIT_ROWS = (
    64  # rows of logits that are converted to float32 at a time, so that the copies stay in the cache
)


def answer_nll(model: Any, batch: PackedBatch) -> Tensor:
    """Return the negative log-likelihood in nats of every answer token: [A], float32.

    `model` must have packed attention (qlora.packed.attention).
    """
    logits_AV = packed_logits(model, batch)
    if torch.is_grad_enabled():
        return F.cross_entropy(logits_AV.float(), batch.targets_A, reduction="none")
    pieces = zip(logits_AV.split(_LOGIT_ROWS), batch.targets_A.split(_LOGIT_ROWS), strict=True)
    return torch.cat([_nll(logits, targets) for logits, targets in pieces])


def _nll(logits_AV: Tensor, targets_A: Tensor) -> Tensor:
    """Compute the NLL of targets without gradients: log-sum-exp of the logits minus the target's logit."""
    scored_A = logits_AV.gather(1, targets_A[:, None])[:, 0]
    return logits_AV.float().logsumexp(-1) - scored_A.float()
