"""Owns the beginnings that prompts share: their keys and values, part by part, from one call to the next.

Refuses to know slots and steps.

Shapes: J key-value heads, P prefix tokens, D head width, T tokens of a pass.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from inference.batch import in_passes
from inference.cached_attention import Stretch
from inference.kv_cache import CacheShape
from qlora.packed.packing import shared_prefix_length
from qlora.packed.stream import Rows

# Runs a pass of tokens at their positions; each stretch of them is of the part that stands beside it.
Fill = Callable[[Sequence[tuple[int, Stretch]], list[int], list[int]], object]


class Prefixes:
    """The prefixes of a search's parts, on one device."""

    def __init__(self, shape: CacheShape, device: torch.device):
        self._shape, self._device = shape, device
        self._kept: dict[int, tuple[tuple[int, ...], Tensor]] = {}  # tokens, and their keys and values

    def blank(self, num_tokens: int = 0) -> Tensor:
        """Make room for the keys and values of so many tokens: [2, layers, J, P, D]."""
        shape = self._shape
        size = (2, shape.num_layers, shape.num_kv_heads, num_tokens, shape.head_dim)
        return torch.zeros(size, dtype=shape.dtype, device=self._device)

    def of(
        self, prompts: Mapping[int, Sequence[tuple[int, ...]]], most_tokens: int, fill: Fill
    ) -> dict[int, Tensor]:
        """Return keys and values of the prefix that each part's prompts begin with, [2, layers, J, P, D].

        They are kept for the next call, and used again if prompts begin with them and share little more.
        Those of several parts are computed together, in passes of at most so many tokens or of one prefix.
        """
        missing: dict[int, tuple[int, ...]] = {}
        for part, owns in prompts.items():
            common = owns[0][: shared_prefix_length(owns)]
            kept = self._kept[part][0] if part in self._kept else None
            if kept is None or common[: len(kept)] != kept or 4 * len(kept) < 3 * len(common):
                missing[part] = common
        parts = list(missing)
        for run in in_passes([len(missing[part]) for part in parts], most_tokens):
            self._compute({part: missing[part] for part in parts[run.start : run.stop]}, fill)
        return {part: self._kept[part][1] for part in prompts}

    def _compute(self, prefixes: Mapping[int, tuple[int, ...]], fill: Fill) -> None:
        stores = {part: self.blank(len(tokens)) for part, tokens in prefixes.items()}
        some = {part: tokens for part, tokens in prefixes.items() if tokens}
        stretches = [
            (part, Stretch(self.blank(), Rows((len(tokens),), 0, self._device), _kept_in(stores[part])))
            for part, tokens in some.items()
        ]
        if some:
            tokens = [token for one in some.values() for token in one]
            fill(stretches, tokens, [place for one in some.values() for place in range(len(one))])
        self._kept |= {part: (prefixes[part], store) for part, store in stores.items()}


def _kept_in(prefix: Tensor) -> Callable[[int, Tensor, Tensor], None]:
    """Return the `store` of a stretch that is the prefix itself."""

    def store(layer: int, k_TJD: Tensor, v_TJD: Tensor) -> None:
        prefix[:, layer] = torch.stack([k_TJD, v_TJD]).transpose(1, 2)

    return store
