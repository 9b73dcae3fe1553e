"""Owns the AdapterBank: many trials' adapters on one frozen base, trained and evaluated in shared passes.

A sweep trains one base with many settings. Only the adapters (qlora.lora.adapter) differ, so the base is
loaded once, and the tokens of all trials go through it together; each part of the stream goes through its own
trial's adapter. Every linear layer that an adapter targets becomes a BankedLinear (qlora.lora.banked_linear),
which does that.

Adapters are loaded and saved in PEFT's layout, and a fresh adapter is the one that PEFT would draw.

Refuses to know schedules and data.

Source: mLoRA, https://arxiv.org/abs/2312.02515
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.base.device import to_host
from qlora.base.fused import fuse
from qlora.base.model import dequantised_if_it_fits, linear_layers, load_base
from qlora.base.nf4 import choose_kernel
from qlora.base.recomputed import recompute_layers
from qlora.base.reference import split_revision
from qlora.config import BaseModelSettings, InputError, TrialSettings
from qlora.data.prompts import EncodedExample
from qlora.lora.adapter import Adapter, Place, lay_out_matrices
from qlora.lora.banked_linear import BankedLinear, Route, Switch, kernels
from qlora.lora.peft_folder import WEIGHTS, AdapterContent
from qlora.lora.products import MAX_GPU_RANK, Dropout, LayerPart
from qlora.lora.tables import BankTables, make_bank_tables, make_pass_tables
from qlora.lora.targets import is_targeted, unknown_targets
from qlora.packed.agreement import pack_attention
from qlora.packed.attention import packed_logits
from qlora.packed.packing import Group, pack
from qlora.packed.stream import PackedBatch


@dataclass(eq=False)
class AdapterBank:
    """Adapters on one base, which has packed attention.

    base_name: the base that saved adapters name. layers: the linear layers that any adapter targets. A
    layer's number is its place among all linear layers, whatever adapters there are: its dropout depends on
    it. recomputes: see qlora.base.recomputed.
    """

    model: PreTrainedModel
    base_name: str
    layers: dict[str, BankedLinear] = field(default_factory=dict)
    switch: Switch = field(default_factory=Switch)
    recorder: Any = None  # a qlora.recorded_passes.Recorder, once there is a pass to record
    mean_parameters: float = 0.0  # of a linear layer
    recomputes: bool = False
    # The widths (in, out) of each layer that an adapter may target.
    _linear: dict[str, tuple[int, int]] = field(default_factory=dict)
    _tables: dict[tuple[int, ...], BankTables] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choose_kernel(self.model)
        self._linear = linear_layers(self.model)
        num_parameters = sum(math.prod(widths) for widths in self._linear.values())
        self.mean_parameters = num_parameters / max(1, len(self._linear))

    @property
    def device(self) -> torch.device:
        """Return the device of base and adapters."""
        return self.model.device

    @property
    def num_layers(self) -> int:
        """Count the linear layers that an adapter may target."""
        return len(self._linear)

    def recompute(self) -> bool:
        """Have layers computed again in each backward from now on; tell whether that is new, and possible."""
        if self.recomputes or not recompute_layers(self.model):
            return False
        self.recomputes = True
        if self.recorder is not None:
            self.recorder.stop()
        return True

    def in_kernels(self, adapters: Sequence[Adapter | None]) -> bool:
        """Tell whether there are adapters whose products the GPU's kernels compute: all or none of these."""
        ranks = [adapter.settings.lora_r for adapter in adapters if adapter is not None]
        has_kernels = kernels is not None and self.device.type == "cuda"
        return has_kernels and bool(ranks) and max(ranks) <= MAX_GPU_RANK

    def fresh_weights(self, settings: TrialSettings) -> Tensor:
        """Return the initial weights of a new adapter, [n] float32 on the CPU.

        B is 0, so that the adapter starts equal to the base; A is drawn from `settings.seed` alone, as PEFT
        draws it. This is slow (10 ns a weight), and any thread may do it while others train. Raises
        InputError if one of the target modules names no linear layer, and on a GPU for a rank that its
        kernels don't take.
        """
        layers = self._places(settings)
        weights = torch.zeros(max((b.end for _, b in layers.values()), default=0))
        generator = torch.Generator().manual_seed(settings.seed)
        for a, b in layers.values():
            # PEFT makes two linear layers, which draw their own weights, and then draws A anew.
            for matrix in (torch.empty(a.shape), torch.empty(b.shape), a.of(weights)):
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
        return weights

    def attach(
        self, settings: TrialSettings, weights: Tensor | None = None, *, trains: bool = True
    ) -> Adapter:
        """Put a new adapter on the base.

        `weights` are its `fresh_weights`, if they are there already. One that does not train may have any
        rank; on the device it has nothing but what is multiplied with. Raises InputError as `fresh_weights`
        does.
        """
        layers = self._places(settings, any_rank=not trains)
        in_float32, is_zero = self.model.dtype == torch.float32, weights is None and not trains
        if weights is None:
            num_weights = max((b.end for _, b in layers.values()), default=0)
            weights = self.fresh_weights(settings) if trains else torch.zeros(num_weights)
        if trains or in_float32:
            weights = weights.to(self.device)
        if new := [name for name in layers if name not in self.layers]:
            for name in new:
                self._make_banked(name)
            self._meet_siblings()
        served = weights
        if not in_float32:
            served = torch.zeros_like(weights, dtype=self.model.dtype, device=self.device)
        adapter = Adapter(
            settings=settings,
            weights=weights,
            gradients=torch.zeros_like(weights) if trains else served,
            served=served,
            layers=layers,
        )
        if not is_zero:
            adapter.refresh()
        return adapter

    def detach(self, adapter: Adapter) -> None:
        """Forget what is kept for an adapter. Its memory is freed with the last reference to it."""
        self._tables = {key: tables for key, tables in self._tables.items() if adapter.number not in key}

    @contextmanager
    def routed(
        self, batch: PackedBatch, adapters: Sequence[Adapter | None], dropouts: Sequence[Dropout | None]
    ) -> Iterator[None]:
        """Route the model's layers, within, through the adapters of a batch's parts.

        Layers add the i-th adapter's products (None: nothing), with the i-th dropout, to the tokens of the
        batch's i-th part.
        """
        bounds = tuple((part.start, part.end) for part in batch.parts)
        with self.switch.on_route(self.route(bounds, adapters, dropouts)):
            yield

    def route(
        self,
        bounds: Sequence[tuple[int, int]],
        adapters: Sequence[Adapter | None],
        dropouts: Sequence[Dropout | None],
    ) -> Route:
        """Make a route of passes whose tokens from the i-th first one to its end go through the i-th adapter.

        Layers add that adapter's products (None: nothing), with the i-th dropout, if any. It holds until one
        of the adapters is detached.
        """
        assert len(adapters) == len(bounds)
        anchor = torch.zeros((), device=self.device, requires_grad=torch.is_grad_enabled())
        tables: dict[str, Any] = {}
        if self.in_kernels(adapters):
            tables = {
                "pass_tables": make_pass_tables(self.device, bounds, dropouts),
                "layer_tables": self.tables_of(adapters).layers,
            }

        def parts_at(layer: str) -> list[LayerPart]:
            found = []
            for adapter, (start, end), dropout in zip(adapters, bounds, dropouts, strict=True):
                part = None if adapter is None else adapter.part_at(layer, start, end, dropout)
                if part is not None:
                    found.append(part)
            return found

        return Route(anchor, parts_at, **tables)

    @contextmanager
    def serving(self, adapter: Adapter | None) -> Iterator[None]:
        """Route the model's layers, within, so that each token of any pass goes through one adapter."""

        def parts_at(layer: str) -> list[LayerPart]:
            part = None if adapter is None else adapter.part_at(layer, 0, sys.maxsize)
            return [] if part is None else [part]

        with self.switch.on_route(Route(torch.zeros((), device=self.device), parts_at)):
            yield

    def tables_of(self, adapters: Sequence[Adapter | None]) -> BankTables:
        """Return the kernels' tables of these adapters at all layers. GPUs only.

        They are kept until one of the adapters is detached.
        """
        key = tuple(-1 if adapter is None else adapter.number for adapter in adapters)
        if key not in self._tables:
            layers = []
            for name in self._linear:
                layers.append([None if one is None else one.part_at(name) for one in adapters])
            self._tables[key] = make_bank_tables(layers, self.device)
        return self._tables[key]

    def save(self, adapter: Adapter, folder: Path) -> None:
        """Write an adapter's PEFT folder. Raises OSError."""
        self.content(adapter).write(folder)

    def content(self, adapter: Adapter, weights: Tensor | None = None) -> AdapterContent:
        """Return the content of an adapter's PEFT folder, a copy of what it is now.

        `weights`: its weights [n] at another time, in the host's memory, which are taken instead.
        """
        from peft import LoraConfig  # takes seconds to load

        name, revision = split_revision(self.base_name)
        # Targets are given by the ends of their names (q_proj) if no other module has them, else in full.
        ends = {layer.rpartition(".")[2] for layer in adapter.layers}
        num_named = sum(layer.rpartition(".")[2] in ends for layer, _ in self.model.named_modules())
        targets = sorted(ends if num_named == len(adapter.layers) else adapter.layers)
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
        return AdapterContent(
            config, adapter.matrices(to_host(adapter.weights) if weights is None else weights)
        )

    def load(self, adapter: Adapter, folder: Path) -> None:
        """Load the weights of a PEFT folder into an adapter.

        Raises InputError if they are of other layers or of another rank.
        """
        found = load_file(folder / WEIGHTS)
        matrices = adapter.matrices()
        if _shapes(found) != _shapes(matrices):
            raise InputError(folder, "holds an adapter of other layers or another rank")
        for name, matrix in matrices.items():
            matrix.copy_(found[name])
        adapter.refresh()

    def _places(self, settings: TrialSettings, any_rank: bool = False) -> dict[str, tuple[Place, Place]]:
        """Lay out an adapter's matrices: the places of A and B of each targeted layer. Raises InputError."""
        if settings.lora_r > MAX_GPU_RANK and self.device.type == "cuda" and not any_rank:
            raise InputError("lora_r", f"{settings.lora_r} is more than the {MAX_GPU_RANK} that a GPU takes")
        unknown = unknown_targets(settings.target_modules, list(self._linear))
        if unknown:
            raise InputError("target_modules", unknown)
        targeted = {
            layer: widths
            for layer, widths in self._linear.items()
            if is_targeted(layer, settings.target_modules)
        }
        return lay_out_matrices(targeted, settings.lora_r)

    def _make_banked(self, name: str) -> None:
        """Replace a linear layer of the model by a BankedLinear."""
        index = list(self._linear).index(name)
        self.layers[name] = BankedLinear(self.model.get_submodule(name), self.switch, name, index)
        self.model.set_submodule(name, self.layers[name])

    @torch.no_grad()
    def _meet_siblings(self) -> None:
        """Let the switch see which layers read the same input, by a pass of two tokens.

        Else the first pass would add up gradients in another order than all behind it, and a trial's first
        step would depend on whether others came before.
        """
        batch = pack([EncodedExample("", (0,), (0,))], self.device)
        with self.routed(batch, [None] * len(batch.parts), [None] * len(batch.parts)):
            packed_logits(self.model, batch)


def load_bank(base: BaseModelSettings, device: torch.device | None = None) -> AdapterBank:
    """Load a base that is ready for many adapters, on this process's device unless another is given.

    Its NF4 values are dequantised once if memory allows. Raises InputError if the base can't be loaded.
    """
    model = dequantised_if_it_fits(load_base(base, device))
    if model.device.type == "cuda":
        fuse(model)
    pack_attention(model, base.name)  # last, so that what is fused is tried, too
    return AdapterBank(model, base.name)


def make_dropout(adapter: Adapter, group: Group, step: int) -> Dropout | None:
    """Return the dropout masks of a group in a step of its trial; None for an adapter without dropout."""
    if adapter.settings.lora_dropout == 0:
        return None
    suffix_lengths = [example.num_tokens - group.prefix_length for example in group.examples]
    return Dropout(
        p=adapter.settings.lora_dropout,
        seed=adapter.settings.seed,
        step=step,
        names=(0, *(name + 1 for name in group.names)),  # 0 is the prefix
        lengths=(group.prefix_length, *suffix_lengths),
    )


def _shapes(matrices: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in matrices.items()}
