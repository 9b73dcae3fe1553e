"""Owns the devices that a sweep can be planned for without having one: what their makers state of them.

A product of matrices reaches a share of the stated speed that differs from card to card, and from one
cooling to another; so a plan is made for a slow and for a quick one.

Sources: NVIDIA's data sheets, for products of bfloat16 without sparsity:
https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet (H100, H200)
https://www.nvidia.com/en-us/data-center/a100/ (A100)
https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413 (L40S)
https://www.nvidia.com/en-us/data-center/l4/ (L4)
https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf (A10G)
https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf (RTX 4090)
"""

import re
from dataclasses import dataclass

from qlora.config import InputError
from tuning.device import Device

_DRIVER_BYTES = 1 << 29  # of a card's memory, which nobody gets
# Shares of what is stated, on a slow card and on a quick one.
_SPEEDS = (0.45, 0.85)
_BANDWIDTHS = (0.7, 0.95)
MEASURED = ("H100", "H200")  # cards that this project's figures are of


@dataclass(frozen=True)
class _Stated:
    """The figures of a card: memory in GiB, bfloat16 operations and bytes in 1e12 a second."""

    memory_gib: float
    speed: float
    bandwidth: float


_CARDS = {
    "H200": _Stated(140.4, 989, 4.8),
    "H100": _Stated(79.6, 989, 3.35),
    "A100-80G": _Stated(79.6, 312, 2.04),
    "A100-40G": _Stated(39.6, 312, 1.555),
    "L40S": _Stated(44.5, 362, 0.864),
    "A10G": _Stated(22.5, 70, 0.6),
    "L4": _Stated(22.5, 121, 0.3),
    "RTX4090": _Stated(23.9, 165, 1.008),
}
KNOWN = tuple(_CARDS)


def known_device(text: str) -> tuple[Device, Device, int]:
    """Return a slow and a quick card of the kind that a text such as `H100` or `H100:2` names, and how many.

    Raises InputError for a kind that is not known.
    """
    found = re.fullmatch(r"([\w-]+)(?::([1-9]\d*))?", text)
    names = {name.lower(): name for name in _CARDS}
    name = names.get(found[1].lower()) if found else None
    if found is None or name is None:
        raise InputError("--on", f"{text} is no known card; give one of {', '.join(KNOWN)}, as in H100:2")
    card = _CARDS[name]
    slow, quick = (
        Device(
            "cuda",
            int(card.memory_gib * 2**30) - _DRIVER_BYTES,
            speed * card.speed * 1e12,
            has_bfloat16=True,
            name=name,
            bandwidth=bandwidth * card.bandwidth * 1e12,
            fuses_mlp=True,  # nodes are set up with Liger
        )
        for speed, bandwidth in zip(_SPEEDS, _BANDWIDTHS, strict=True)
    )
    return slow, quick, int(found[2] or 1)
