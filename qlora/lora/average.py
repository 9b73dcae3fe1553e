"""Owns averages of adapters: the weighted mean of their updates, as an adapter of its own.

An adapter adds scale x B A to a layer's weight. A mean of such updates is a product of two matrices again:
the members' A stand one below the other, their B, times weight and scale, side by side. That is exact, and
its rank is the sum of theirs. Where that is too high, the nearest product of a lower rank takes its place:
the largest singular values of B A, found from the small Gram matrices of its factors.

Refuses to know which adapters are worth averaging.

Shapes: R (RANK) of all members together, K of the result, I (IN) and O (OUT) a layer's widths.
Source: Model soups, https://arxiv.org/abs/2203.05482; Eckart and Young 1936,
https://doi.org/10.1007/BF02288367.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from qlora.config import TrialSettings
from qlora.lora.adapter import Adapter
from qlora.lora.bank import AdapterBank
from qlora.lora.peft_folder import WEIGHTS, check_adapter

# By layer: A [rank, in] and B [out, rank], whose product is what is added to the layer's weight.
Update = Mapping[str, tuple[Tensor, Tensor]]
_A, _B, _PREFIX = ".lora_A.weight", ".lora_B.weight", "base_model.model."
_NEGLIGIBLE = 1e-14  # of the largest eigenvalue: what rounding makes of a direction that is not there


def read_update(folder: Path) -> Update:
    """Read what the adapter of a PEFT folder adds to each layer, to the host's memory; its scale is in B.

    Raises InputError for a folder without an adapter.
    """
    config = check_adapter(folder)
    scale = config["lora_alpha"] / config["r"]
    found = load((folder / WEIGHTS).read_bytes())  # not a view of a file that may go meanwhile
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


def reduced(update: Update, rank: int, device: torch.device | None = None) -> Update:
    """Return the nearest update whose layers have at most this rank; layers that have it stay as they are.

    Nearest in the sum of squares. It is computed on the device, if one is given, and brought back.
    """
    found = dict(update)
    for layer, (a_RI, b_OR) in update.items():
        if len(a_RI) > rank:
            a_KI, b_OK = _nearest(a_RI.to(device, torch.float64), b_OR.to(device, torch.float64), rank)
            found[layer] = (a_KI.to(a_RI), b_OK.to(b_OR))
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


def _nearest(a_RI: Tensor, b_OR: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the nearest product of a rank: A [K, I] and B [O, K], both of one size.

    With A A' = V s V', the rows of Q = s^-1/2 V' A are orthonormal, and B A = (B V s^1/2) Q. The Gram matrix
    of the left factor has B A's squared singular values and their directions.
    """
    s_R, v_RR = torch.linalg.eigh(a_RI @ a_RI.T)
    is_there_R = s_R > _NEGLIGIBLE * s_R[-1]
    root_R = s_R.clamp(min=0).sqrt() * is_there_R
    inverse_R = torch.where(is_there_R, 1 / root_R, 0.0)
    left_OR = b_OR @ v_RR * root_R
    squares_R, u_RR = torch.linalg.eigh(left_OR.T @ left_OR)
    u_RK, value_K = u_RR[:, -rank:], squares_R[-rank:].clamp(min=0).sqrt()
    size_K = value_K.sqrt().clamp(min=torch.finfo(torch.float32).tiny)  # shared out between both factors
    b_OK = left_OR @ u_RK / size_K
    a_KI = size_K[:, None] * (u_RK.T @ (inverse_R[:, None] * (v_RR.T @ a_RI)))
    return a_KI, b_OK
