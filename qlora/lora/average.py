"""Owns averages of adapters: the weighted mean of their updates, as an adapter of its own.

An adapter adds scale x B A to a layer's weight. A mean of such updates is a product of two matrices again:
the members' A stand one below the other, their B, times weight and scale, side by side. That is exact, and
its rank is the sum of theirs. Where that is too high, the nearest product of a lower rank takes its place:
the largest singular values of B A, found from the small Gram matrices of its factors.

Refuses to know which adapters are worth averaging.

Shapes: R (RANK) of all members together, K of the result, I (IN) and O (OUT) a layer's widths, L layers.
Source: Model soups, https://arxiv.org/abs/2203.05482; Eckart and Young 1936,
https://doi.org/10.1007/BF02288367.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora.config import TrialSettings
from qlora.lora.adapter import Adapter
from qlora.lora.bank import AdapterBank
from qlora.lora.peft_folder import WEIGHTS, check_adapter

# By layer: A [rank, in] and B [out, rank], whose product is what is added to the layer's weight.
Update = Mapping[str, tuple[Tensor, Tensor]]
_A, _B, _PREFIX = ".lora_A.weight", ".lora_B.weight", "base_model.model."
_NEGLIGIBLE = 1e-14  # of the largest eigenvalue: what rounding makes of a direction that is not there


def read_update(folder: Path, device: torch.device | None = None) -> Update:
    """Read what the adapter of a PEFT folder adds to each layer; its scale is in B.

    Raises InputError for a folder without an adapter.
    """
    config = check_adapter(folder)
    scale = config["lora_alpha"] / config["r"]
    found = load_file(folder / WEIGHTS, device=str(device or "cpu"))
    names = [name.removesuffix(_A) for name in found if name.endswith(_A)]
    return {name.removeprefix(_PREFIX): (found[name + _A], scale * found[name + _B]) for name in names}


def mean_update(members: Sequence[Update], weights: Sequence[float]) -> Update:
    """Return the weighted mean of updates, exactly. A member without a layer adds nothing to it."""
    layers = dict.fromkeys(layer for member in members for layer in member)
    found = {}
    for layer in layers:
        there = [(one[layer], weight) for one, weight in zip(members, weights, strict=True) if layer in one]
        a_RI = torch.cat([a for (a, _), _ in there])
        b_OR = torch.cat([weight * b for (_, b), weight in there], dim=1)
        found[layer] = (a_RI, b_OR)
    return found


def rank_of(update: Update) -> int:
    """Return the highest rank of an update's layers."""
    return max(len(a) for a, _ in update.values())


def reduced(update: Update, rank: int) -> Update:
    """Return the nearest update whose layers have at most this rank; layers that have it stay as they are.

    Nearest in the sum of squares. Layers of one shape are computed together.
    """
    shapes: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    found = dict(update)
    for layer, (a, b) in update.items():
        if len(a) > rank:
            shapes.setdefault((a.shape, b.shape), []).append(layer)
    for layers in shapes.values():
        a_LRI = torch.stack([update[layer][0] for layer in layers])
        b_LOR = torch.stack([update[layer][1] for layer in layers])
        for layer, a, b in zip(layers, *_nearest(a_LRI, b_LOR, rank), strict=True):
            found[layer] = (a, b)
    return found


def attach_update(bank: AdapterBank, update: Update) -> Adapter:
    """Put an update on a base as an adapter to measure and to save, not to train; its scale is 1.

    Layers of a lower rank than others are filled up with zeros.
    """
    rank = rank_of(update)
    settings = TrialSettings(lora_r=rank, lora_alpha=rank, lora_dropout=0, target_modules=tuple(update))
    adapter = bank.attach(settings, trains=False)
    matrices = adapter.matrices()
    for layer, (a, b) in update.items():
        matrices[_PREFIX + layer + _A][: len(a)].copy_(a)
        matrices[_PREFIX + layer + _B][:, : len(a)].copy_(b)
    adapter.refresh()
    return adapter


def _nearest(a_LRI: Tensor, b_LOR: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the nearest products of a rank: A [L, K, I] and B [L, O, K], both of one size.

    With A A' = V s V', the rows of Q = s^-1/2 V' A are orthonormal, and B A = (B V s^1/2) Q. The Gram matrix
    of the left factor has B A's squared singular values and their directions.
    """
    a_LRI, b_LOR = a_LRI.double(), b_LOR.double()
    s_LR, v_LRR = torch.linalg.eigh(a_LRI @ a_LRI.mT)
    is_there_LR = s_LR > _NEGLIGIBLE * s_LR[:, -1:]
    root_LR = s_LR.clamp(min=0).sqrt() * is_there_LR
    inverse_LR = torch.where(is_there_LR, 1 / root_LR, 0.0)
    left_LOR = b_LOR @ v_LRR * root_LR[:, None]
    squares_LR, u_LRR = torch.linalg.eigh(left_LOR.mT @ left_LOR)
    u_LRK, value_LK = u_LRR[..., -rank:], squares_LR[:, -rank:].clamp(min=0).sqrt()
    size_LK = value_LK.sqrt().clamp(min=torch.finfo(torch.float32).tiny)  # shared out between both factors
    b_LOK = left_LOR @ u_LRK / size_LK[:, None]
    a_LKI = size_LK[..., None] * (u_LRK.mT @ (inverse_LR[..., None] * (v_LRR.mT @ a_LRI)))
    return a_LKI.float(), b_LOK.float()
