"""Owns the AdapterBank: many trials' LoRA adapters on one frozen base, trained and evaluated in one pass over one stream.

LoRA (https://arxiv.org/abs/2106.09685) adds to a frozen layer y = x W' the product scale * x A' B' of two narrow
matrices, A [r, in] and B [out, r], with scale = alpha / r; B starts at zero, so that a new adapter changes nothing.
Every linear layer that an adapter targets becomes a BankedLinear (qlora.lora.banked_linear). An adapter's weights
are one flat float32 vector, and so are its gradients: an optimizer step is a few launches, however many layers there
are.

PEFT's layout goes in and out, and a fresh adapter is the one that PEFT would draw. Refuses to know schedules and
data.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.base.fused import fuse_for_training
from qlora.base.model import dequantised_if_it_fits, linear_layers, load_base
from qlora.base.reference import split_revision
from qlora.config import BaseModelSettings, InputError, TrialSettings
from qlora.lora.banked_linear import BankedLinear, Route, Switch, kernels
from qlora.lora.peft_folder import WEIGHTS, AdapterContent
from qlora.lora.products import MAX_GPU_RANK, Dropout, LayerPart
from qlora.lora.tables import BankTables, make_bank_tables, make_pass_tables
from qlora.packed.attention import use_packed_attention
from qlora.packed.packing import Group
from qlora.packed.stream import PackedBatch

_ALIGNMENT = 16  # elements: every matrix begins where vector loads may


@dataclass(eq=False)
class Adapter:
    """One trial's LoRA weights on a bank.

    weights and gradients: [n] float32, all matrices end to end. served: the weights in the model's dtype, the same tensor if
    that is float32; `refresh` makes them follow. layers: for each targeted layer (A, B) as places in those vectors.
    """

    settings: TrialSettings
    weights: Tensor
    gradients: Tensor
    served: Tensor
    layers: dict[str, tuple["_Place", "_Place"]]

    @property
    def scale(self) -> float:
        """What a LoRA product is multiplied by."""
        return self.settings.lora_alpha / self.settings.lora_r

    def refresh(self) -> None:
        """Bring what the model multiplies with up to the weights."""
        if self.served is not self.weights:
            self.served.copy_(self.weights)

    def matrices(self, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Views of the weights, or of a copy of them, under PEFT's names, A [r, in] and B [out, r]."""
        return {
            f"base_model.model.{layer}.lora_{letter}.weight": place.of(
                self.weights if weights is None else weights
            )
            for layer, places in self.layers.items()
            for letter, place in zip("AB", places, strict=True)
        }


@dataclass(frozen=True)
class _Place:
    start: int
    shape: tuple[int, int]

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + math.prod(self.shape)].view(self.shape)


@dataclass(eq=False)
class AdapterBank:
    """Adapters on one base, which has packed attention. `base_name` is what saved adapters say they were trained on. A layer has the
    same number whatever adapters there are: its dropout depends on it."""

    model: PreTrainedModel
    base_name: str
    layers: dict[str, BankedLinear] = field(default_factory=dict)
    switch: Switch = field(default_factory=Switch)
    recorder: Any = None  # a qlora.recorded_passes.Recorder, once there is a pass to record
    mean_parameters: float = 0.0  # of a linear layer
    # (in, out) of each layer that an adapter may target
    _linear: dict[str, tuple[int, int]] = field(default_factory=dict)
    _tables: dict[tuple[int, ...], BankTables] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._linear = linear_layers(self.model)
        self.mean_parameters = sum(map(math.prod, self._linear.values())) / max(1, len(self._linear))

    @property
    def device(self) -> torch.device:
        """Where base and adapters are."""
        return self.model.device

    @property
    def num_layers(self) -> int:
        """Linear layers that an adapter may target."""
        return len(self._linear)

    @property
    def has_kernels(self) -> bool:
        """Whether adapters' products are the GPU's kernels."""
        return kernels is not None and self.device.type == "cuda"

    def fresh_weights(self, settings: TrialSettings) -> Tensor:
        """Those of a new adapter, [n] float32 on the CPU: B = 0, so that it starts equal to the base; A drawn from `settings.seed` alone,
        as PEFT draws it. Slow (10 ns a weight), and any thread may do it while others train.

        Raises InputError if no linear layer has one of the target names.
        """
        layers, length = self._places(settings)
        weights, generator = torch.zeros(length), torch.Generator().manual_seed(settings.seed)
        # PEFT makes both layers, each drawing its weights, and then draws A anew
        for a, b in layers.values():
            for matrix in (torch.empty(a.shape), torch.empty(b.shape), a.of(weights)):
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
        return weights

    def attach(self, settings: TrialSettings, weights: Tensor | None = None) -> Adapter:
        """A new adapter. `weights`: its `fresh_weights`, if they are there already. Raises InputError as that does."""
        layers, _ = self._places(settings)
        weights = (self.fresh_weights(settings) if weights is None else weights).to(self.device)
        for name in layers:
            self._make_banked(name)
        served = weights if self.model.dtype == torch.float32 else weights.to(self.model.dtype)
        return Adapter(settings, weights, torch.zeros_like(weights), served, layers)

    def detach(self, adapter: Adapter) -> None:
        """Forget what was kept for an adapter; its memory goes with its last reference."""
        self._tables = {key: tables for key, tables in self._tables.items() if id(adapter) not in key}

    @contextmanager
    def routed(
        self, batch: PackedBatch, adapters: Sequence[Adapter | None], dropouts: Sequence[Dropout | None]
    ) -> Iterator[None]:
        """Within: the model's layers add the i-th adapter's products (None: nothing) to the tokens of the batch's i-th part, with its
        dropout."""
        assert len(adapters) == len(batch.parts)
        bounds = tuple((part.start, part.end) for part in batch.parts)
        anchor = torch.zeros((), device=self.device, requires_grad=torch.is_grad_enabled())
        tables: dict[str, Any] = {}
        if self.has_kernels and any(adapter is not None for adapter in adapters):
            tables = {
                "pass_tables": make_pass_tables(self.device, bounds, dropouts),
                "layer_tables": self.tables_of(adapters).layers,
            }

        def parts_at(layer: str) -> list[LayerPart]:
            found = (
                _layer_part(adapter, layer, *bound, dropout)
                for adapter, bound, dropout in zip(adapters, bounds, dropouts, strict=True)
            )
            return [part for part in found if part is not None]

        with self.switch.on_route(Route(anchor, parts_at, **tables)):
            yield

    def tables_of(self, adapters: Sequence[Adapter | None]) -> BankTables:
        """The kernels' tables of these adapters at all layers, kept until one of them is detached. GPUs only."""
        key = tuple(id(adapter) for adapter in adapters)
        if key not in self._tables:
            parts = [
                [_layer_part(adapter, name, 0, 0, None) for adapter in adapters] for name in self._linear
            ]
            self._tables[key] = make_bank_tables(parts, self.device)
        return self._tables[key]

    def save(self, adapter: Adapter, folder: Path) -> None:
        """Write a PEFT folder."""
        self.content(adapter).write(folder)

    def content(self, adapter: Adapter) -> AdapterContent:
        """Of an adapter's PEFT folder; on a CPU the matrices are the adapter's own, not copies."""
        from peft import LoraConfig

        name, revision = split_revision(self.base_name)
        leaves = {layer.rpartition(".")[2] for layer in adapter.layers}
        are_all = sum(name.rpartition(".")[2] in leaves for name in self._linear) == len(adapter.layers)
        targets = sorted(leaves if are_all else adapter.layers)
        config = LoraConfig(
            r=adapter.settings.lora_r,
            lora_alpha=adapter.settings.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=adapter.settings.lora_dropout,
            target_modules=targets,
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=name,
            revision=revision,
            inference_mode=True,
        )
        return AdapterContent(config, adapter.matrices(adapter.weights.cpu()))

    def load(self, adapter: Adapter, folder: Path) -> None:
        """Take over the weights of a PEFT folder. Raises InputError if they are not this adapter's."""
        found, matrices = load_file(folder / WEIGHTS), adapter.matrices()
        if _shapes(found) != _shapes(matrices):
            raise InputError(folder, "holds an adapter of other layers or another rank")
        for name, matrix in matrices.items():
            matrix.copy_(found[name])
        adapter.refresh()

    def _places(self, settings: TrialSettings) -> tuple[dict[str, tuple[_Place, _Place]], int]:
        if settings.lora_r > MAX_GPU_RANK and self.device.type == "cuda":
            raise InputError("lora_r", f"{settings.lora_r} is more than the {MAX_GPU_RANK} that a GPU takes")
        unknown = unknown_targets(settings.target_modules, list(self._linear))
        if unknown:
            raise InputError("target_modules", unknown)
        layers, end = {}, 0
        for name, (num_in, num_out) in self._linear.items():
            if is_targeted(name, settings.target_modules):
                places = []
                for shape in ((settings.lora_r, num_in), (num_out, settings.lora_r)):
                    places.append(_Place(end, shape))
                    end += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
                layers[name] = (places[0], places[1])
        return layers, end

    def _make_banked(self, name: str) -> None:
        if name not in self.layers:
            self.layers[name] = BankedLinear(
                self.model.get_submodule(name), self.switch, name, list(self._linear).index(name)
            )
            self.model.set_submodule(name, self.layers[name])


def is_targeted(name: str, wanted: Any) -> bool:
    """Whether a linear layer is among the target modules, by its whole name or the end of it."""
    return wanted == "all-linear" or any(f".{name}".endswith(f".{one}") for one in wanted)


def unknown_targets(wanted: Any, linear: Sequence[str]) -> str | None:
    """What is wrong with target modules, if one of them names no linear layer (the head is none); else None."""
    if wanted == "all-linear":
        return None
    missing = [one for one in wanted if not any(is_targeted(name, (one,)) for name in linear)]
    if not missing:
        return None
    there = sorted({name.rpartition(".")[2] for name in linear})
    return f"no linear layer is called {', '.join(missing)}; there are: {', '.join(there)}"


def load_bank(base: BaseModelSettings, device: torch.device | None = None) -> AdapterBank:
    """A base ready for many adapters, on this process's device unless another is given, its NF4 values dequantised once if memory
    allows. Raises InputError if it can't be had."""
    model = dequantised_if_it_fits(load_base(base, device))
    use_packed_attention(model)
    if model.device.type == "cuda":
        fuse_for_training(model)
    return AdapterBank(model, base.name)


def make_dropout(adapter: Adapter, group: Group, step: int) -> Dropout | None:
    """The masks of a group in a step of its trial; None for an adapter without dropout."""
    if adapter.settings.lora_dropout == 0:
        return None
    lengths = (group.prefix_length, *(example.num_tokens - group.prefix_length for example in group.examples))
    return Dropout(
        adapter.settings.lora_dropout,
        adapter.settings.seed,
        step,
        (0, *(name + 1 for name in group.names)),
        lengths,
    )


def _shapes(matrices: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in matrices.items()}


def _layer_part(
    adapter: Adapter | None, name: str, start: int, end: int, dropout: Dropout | None
) -> LayerPart | None:
    places = adapter.layers.get(name) if adapter else None
    if adapter is None or places is None:
        return None
    a, b = places
    return LayerPart(
        start,
        end,
        a.of(adapter.served),
        b.of(adapter.served),
        a.of(adapter.gradients),
        b.of(adapter.gradients),
        adapter.scale,
        dropout,
    )
