"""Owns one adapter: its weights as one flat vector, and its matrices as views of that vector.

LoRA adds to a frozen layer y = x W' the product scale * x A' B' of two narrow matrices, A [r, in] and
B [out, r], with scale = alpha / r. The matrices of all layers stand end to end in one float32 vector, and so
do their gradients: an optimizer step is a few launches, however many layers there are.

Refuses to know the base.

Source: LoRA, https://arxiv.org/abs/2106.09685
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from qlora.config import TrialSettings
from qlora.lora.products import Dropout, LayerPart

_ALIGNMENT = 16  # elements: every matrix begins where vector loads may


@dataclass(frozen=True)
class Place:
    """The place of one matrix in a flat vector: its first element and its shape."""

    start: int
    shape: tuple[int, int]

    @property
    def end(self) -> int:
        """Return where the next matrix may begin: behind the last element, rounded up to be aligned."""
        return self.start + -(-math.prod(self.shape) // _ALIGNMENT) * _ALIGNMENT

    def of(self, flat: Tensor) -> Tensor:
        """Return the matrix as a view of the vector."""
        return flat[self.start : self.start + math.prod(self.shape)].view(self.shape)


@dataclass(eq=False)
class Adapter:
    """One trial's LoRA weights on a bank.

    weights, gradients: [n] float32, all matrices end to end. served: the weights in the model's dtype, the
    same tensor if that is float32; `refresh` brings it up to date. One that does not train has no gradients
    of its own, and may have its weights in the host's memory. layers: for each targeted layer the places
    of A and B in these vectors. number: of this adapter alone, in this process.
    """

    settings: TrialSettings
    weights: Tensor
    gradients: Tensor
    served: Tensor
    layers: dict[str, tuple[Place, Place]]
    number: int = field(default_factory=itertools.count().__next__)

    @property
    def scale(self) -> float:
        """Return the factor of the LoRA products: alpha / r."""
        return self.settings.lora_alpha / self.settings.lora_r

    def refresh(self) -> None:
        """Copy the weights to what the model multiplies with, if that is another tensor."""
        if self.served is not self.weights:
            self.served.copy_(self.weights)

    def matrices(self, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Return views of the weights, or of a copy of them, by PEFT's names: A [r, in] and B [out, r]."""
        flat = self.weights if weights is None else weights
        found = {}
        for layer, (a, b) in self.layers.items():
            name_a, name_b = matrix_names(layer)
            found[name_a], found[name_b] = a.of(flat), b.of(flat)
        return found

    def part_at(
        self, layer: str, start: int = 0, end: int = 0, dropout: Dropout | None = None
    ) -> LayerPart | None:
        """Return the weights at a layer, for the stream's tokens start .. end - 1.

        Return None if the adapter leaves the layer alone.
        """
        if layer not in self.layers:
            return None
        a, b = self.layers[layer]
        return LayerPart(
            start=start,
            end=end,
            a=a.of(self.served),
            b=b.of(self.served),
            a_grad=a.of(self.gradients),
            b_grad=b.of(self.gradients),
            scale=self.scale,
            dropout=dropout,
        )


def matrix_names(layer: str) -> tuple[str, str]:
    """Return PEFT's names of a layer's matrices A and B."""
    a, b = (f"base_model.model.{layer}.lora_{matrix}.weight" for matrix in "AB")
    return a, b


def lay_out_matrices(widths: Mapping[str, tuple[int, int]], rank: int) -> dict[str, tuple[Place, Place]]:
    """Give the matrices A [rank, in] and B [out, rank] of each layer a place, end to end.

    `widths` are the widths (in, out) of each layer, by its name.
    """
    places = {}
    end = 0
    for layer, (num_in, num_out) in widths.items():
        a = Place(end, (rank, num_in))
        b = Place(a.end, (num_out, rank))
        places[layer] = (a, b)
        end = b.end
    return places
