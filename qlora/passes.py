"""Owns passes: groups of examples, each with its adapter -> the NLL of their answer tokens, and the adapters' gradients.

A pass over a small model waits for its launches: a linear layer costs a host a millisecond of Python and launches, forward and
backward, whatever its size. So on a GPU passes are recorded as CUDA graphs of rounded sizes and played back: a stream's tail is
a row of its own, which no adapter and no answer belongs to. Results are those of the pass that launches each kernel, up to
rounding. Refuses to know schedules, metrics and trials.

Shapes: T stream tokens, A scored positions, L linear layers, as rounded for a recording.
"""

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora.lora.bank import Adapter, AdapterBank
from qlora.lora.banked_linear import Route
from qlora.lora.products import Dropout
from qlora.packed.packing import Group, lay_out, on_device
from qlora.packed.stream import Layout, PackedBatch, Stretches, bounds_of, prefix_places, stretch_lengths

try:
    from qlora.lora import kernels as lora_kernels
except ImportError:  # Triton comes with torch's CUDA builds only
    lora_kernels = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)
# without gradients, so many rows of logits at a time become probabilities: float32 copies stay in cache
_LOGIT_ROWS = 64
# tokens times parameters of a linear layer: above that, a host launches faster than a GPU works
_LAUNCH_BOUND = 2e11
_MOST_RECORDINGS = 64


def answer_nll(model: Any, batch: PackedBatch) -> Tensor:
    """Negative log-likelihood in nats of every answer token: [A], float32. Logits exist at scored positions only."""
    logits_AV = model(
        input_ids=batch.input_ids_T[None],
        position_ids=batch.position_ids_T[None],
        packed=batch,
        use_cache=False,
        # the gradient of [0] is a copy
        logits_to_keep=batch.predictors_A,
    ).logits.squeeze(0)
    if torch.is_grad_enabled():
        return F.cross_entropy(logits_AV.float(), batch.targets_A, reduction="none")
    parts = zip(logits_AV.split(_LOGIT_ROWS), batch.targets_A.split(_LOGIT_ROWS), strict=True)
    return torch.cat(
        [
            logits.float().logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0].float()
            for logits, targets in parts
        ]
    )


def run_pass(
    bank: AdapterBank,
    groups: Sequence[Group],
    adapters: Sequence[Adapter | None],
    dropouts: Sequence[Dropout | None],
    weights: Sequence[float] | None = None,
    largest: int = 0,
) -> tuple[Layout, Tensor]:
    """One pass over groups, each under its adapter (None: the bare base): (the stream, NLL of its answer tokens [A]).

    With weights, one a group, the gradient of the weighted sum of NLLs is added to the adapters' gradients. `largest`: tokens of the
    largest pass of the step that this one belongs to, if there are others.
    """
    work = Pass(lay_out(groups, bank.device), adapters, dropouts, weights)
    if bank.recorder is None and bank.has_kernels:
        bank.recorder = Recorder(bank)
    if bank.recorder is not None and any(adapter is not None for adapter in adapters):
        found = bank.recorder.run(work, max(largest, work.layout.num_tokens))
        if found is not None:
            return work.layout, found
    batch = on_device(work.layout, bank.device)
    with bank.routed(batch, adapters, dropouts):
        if weights is None:
            with torch.no_grad():
                return work.layout, answer_nll(bank.model, batch)
        nll_A = answer_nll(bank.model, batch)
        (nll_A * torch.from_numpy(work.answer_weights()).to(bank.device)).sum().backward()  # type: ignore[no-untyped-call]
    return work.layout, nll_A.detach()


@dataclass(frozen=True)
class Pass:
    """What one pass works on: a stream, each part's adapter and dropout, and, in training, the weight of each part's answers."""

    layout: Layout
    adapters: Sequence[Adapter | None]
    dropouts: Sequence[Dropout | None]
    weights: Sequence[float] | None

    def answer_weights(self) -> np.ndarray:
        """Of every scored position: [A] float32."""
        return np.repeat(np.array(self.weights, np.float32), self.layout.num_answers)


@dataclass(frozen=True)
class PassSize:
    """What a recording has room for, and what its kernels were made for. `longest`: of a row with its prefix, where a window might
    hide something; `num_layers`: that any adapter targets."""

    tokens: int
    answers: int
    rows: int
    parts: int
    prefix_tokens: int
    longest_row: int
    longest_part: int
    longest_prefix: int
    longest: int
    rank: int
    num_layers: int
    has_dropout: bool
    is_training: bool

    @property
    def kernels(self) -> tuple[int, ...]:
        """What kernels are compiled for."""
        splits = lora_kernels.num_splits(self.num_tiles)
        return (self.rank, self.has_dropout, self.is_training, splits, min(self.parts, 2), self.num_layers)

    @property
    def num_tiles(self) -> int:
        """Room for the tiles of all parts."""
        return -(-self.tokens // lora_kernels.TILE_TOKENS) + self.parts

    @classmethod
    def of(cls, work: "Pass", bank: AdapterBank) -> "PassSize":
        """The size that a pass is rounded up to: 3 % more tokens on average."""
        layout = work.layout
        rows, in_parts, prefixes = stretch_lengths(layout.parts)
        p, t = int(prefixes.sum()), layout.num_tokens
        prefix_tokens = _up_to(p, 64)
        tokens = _up_to(t + prefix_tokens - p, max(128, 2 ** (t.bit_length() - 5)))
        tail = tokens - t
        rank = max(adapter.settings.lora_r for adapter in work.adapters if adapter is not None)
        has_window = getattr(bank.model.config.get_text_config(), "sliding_window", None) is not None
        # Lengths of stretches are limits of a kernel's grid, where what is empty costs nearly nothing.
        row, prefix = _power_of_2(max(int(rows.max()), tail, 1024)), _power_of_2(max(int(prefixes.max()), 64))
        return cls(
            tokens,
            _up_to(len(layout.targets_A), tokens // 4),
            _up_to(len(rows) + 1, 32),
            _power_of_2(len(in_parts)),
            prefix_tokens,
            row,
            _power_of_2(max(int(in_parts.max()), tail, 4096)),
            prefix,
            _up_to(layout.longest, 256) if has_window else row + prefix,
            lora_kernels.padded_rank(rank),
            len(bank.layers),
            any(dropout is not None for dropout in work.dropouts),
            work.weights is not None,
        )


class Recorder:
    """Recordings of a bank's passes, made when a size first comes up, in one pool of memory: they never run at the same time. What
    can't be recorded is launched, and all passes of steps that are large enough to keep a GPU at work: launched passes don't share
    that pool, so the recordings are given back."""

    def __init__(self, bank: AdapterBank):
        self._bank = bank
        self._recordings: dict[PassSize, _Recording] = {}
        self._compiled: set[tuple[int, ...]] = set()
        self._refused: set[PassSize] = set()
        # memory is reused on one stream only
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self._most_tokens = launch_bound_tokens(bank.mean_parameters)
        self._is_off, self._is_at_large_steps = False, False
        self.seconds = {"compiling": 0.0, "recording": 0.0}

    def run(self, work: "Pass", largest: int) -> Tensor | None:
        """NLL of the pass [A], or None if it has to be launched kernel by kernel. `largest`: tokens of its step's largest pass."""
        if self._is_off or self._is_large(largest, work.weights is not None):
            return None
        size = PassSize.of(work, self._bank)
        if size in self._refused:
            return None
        recording = self._recordings.pop(size, None) or self._recorded(size, work)
        if recording is None:
            return None
        self._recordings[size] = recording
        return recording.play(work)

    def _is_large(self, largest: int, is_training: bool) -> bool:
        if not is_training:  # holds little memory either way
            return largest > self._most_tokens
        was, self._is_at_large_steps = (
            self._is_at_large_steps,
            largest > self._most_tokens / (2 if self._is_at_large_steps else 1),
        )
        if self._is_at_large_steps and not was:
            self._give_back()
        return self._is_at_large_steps

    def _recorded(self, size: PassSize, work: "Pass") -> "_Recording | None":
        if len(self._recordings) == _MOST_RECORDINGS:
            # the one that was not played for longest
            del self._recordings[next(iter(self._recordings))]
        try:
            recording = _Recording(self._bank, size)
            recording.fill(work)
            if size.kernels not in self._compiled:
                with self._counted("compiling"):
                    recording.rehearse(self._stream)
                self._compiled.add(size.kernels)
            with self._counted("recording"):
                recording.record(self._pool, self._stream)
            return recording
        # FlashAttention doesn't compute this; or there is no room for it
        except (ValueError, torch.cuda.OutOfMemoryError) as error:
            reason, is_final = str(error).partition("\n")[0], False
        # a model that waits for the GPU: the allocator may be left in the middle of a recording
        except Exception as error:
            reason, is_final = str(error).partition("\n")[0], True
        _log.warning("a pass of %d tokens is not recorded: %s", size.tokens, reason)
        if is_final:
            self.stop()
        else:
            self._refused.add(size)
            self._give_back()
        return None

    @contextmanager
    def _counted(self, work: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[work] += time.monotonic() - started

    @property
    def num_recordings(self) -> int:
        """Sizes that are recorded."""
        return len(self._recordings)

    def stop(self) -> bool:
        """Give the recordings' memory back and record no more; returns whether there were any."""
        had, self._is_off = bool(self._recordings), True
        self._give_back()
        return had

    def _give_back(self) -> None:
        self._recordings.clear()
        self._pool = torch.cuda.graph_pool_handle()  # a pool goes with its last recording
        torch.cuda.empty_cache()


class _Recording:
    """A CUDA graph of a pass, and the buffers it reads: one block of memory, filled by one copy."""

    def __init__(self, bank: AdapterBank, size: PassSize):
        self._bank, self._size = bank, size
        tokens, parts = size.tokens, size.parts + 1  # one more, which is always empty
        self._fields = {
            "ids": (np.int64, tokens),
            "positions": (np.int64, tokens),
            "predictors": (np.int64, size.answers),
            "targets": (np.int64, size.answers),
            "places": (np.int64, size.prefix_tokens),
            "tiles": (np.int64, 3 * size.num_tiles),
            "bounds": (np.int64, 2 * parts),
            "limits": (np.int64, parts),
            "keys": (np.int64, tokens),
            "rows": (np.int32, size.rows + 1),
            "parts": (np.int32, parts + 1),
            "prefixes": (np.int32, parts + 1),
            "factors": (np.float32, parts),
            "weights": (np.float32, size.answers),
            "alone": (np.bool_, tokens),
        }
        self._block = torch.zeros(len(self._host_block()), dtype=torch.uint8, device=bank.device)
        at = SimpleNamespace(
            **{
                name: self._block[start:end].view(getattr(torch, np.dtype(kind).name))
                for name, kind, start, end in self._places()
            }
        )
        stretches = Stretches(
            at.rows,
            at.parts,
            at.prefixes,
            size.longest_row,
            size.longest_part,
            size.longest_prefix,
            at.places,
            at.alone,
        )
        self._batch = PackedBatch(
            at.ids, at.positions, at.predictors, at.targets, (), size.longest, stretches
        )
        self._layers = lora_kernels.make_layer_tables(
            [[None] * parts] * bank.num_layers, bank.device, size.rank
        )
        self._pass_tables = lora_kernels.PassTables(
            size.num_tiles, size.parts, at.tiles, at.bounds, at.keys, at.limits, at.factors, size.has_dropout
        )
        self._weights_A = at.weights
        self._graph = torch.cuda.CUDAGraph()
        self._nll_A = at.weights

    def rehearse(self, stream: torch.cuda.Stream) -> None:
        """Run the pass once without adapters, which compiles its kernels: that can't be done within a recording."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._work()
        torch.cuda.synchronize()

    def record(self, pool: Any, stream: torch.cuda.Stream) -> None:
        """Record the pass, whose kernels are compiled."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # within, nothing that is kept for other passes can be had
        collects = gc.isenabled()
        gc.disable()  # another recording that is freed meanwhile would spoil this one
        try:
            with torch.cuda.stream(stream):
                self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    self._nll_A = self._work()
                finally:
                    self._graph.capture_end()
        finally:
            if collects:
                gc.enable()

    def play(self, work: "Pass") -> Tensor:
        """Run a pass; returns its NLL [A]."""
        self.fill(work)
        self._layers.copy_(
            self._bank.tables_of([*work.adapters, *[None] * (self._size.parts + 1 - len(work.adapters))])
        )
        self._graph.replay()
        return self._nll_A[: len(work.layout.targets_A)].clone()

    def fill(self, work: "Pass") -> None:
        """Put a pass into the buffers."""
        layout, host = work.layout, self._host_block()
        at = SimpleNamespace(
            **{name: host[start:end].view(kind) for name, kind, start, end in self._places()}
        )
        t, tail, a = layout.num_tokens, self._size.tokens - layout.num_tokens, len(layout.targets_A)
        at.ids[:t], at.positions[:t], at.positions[t:] = layout.ids_T, layout.positions_T, np.arange(tail)
        # one place for all would be slow
        at.predictors[:a], at.predictors[a:] = layout.predictors_A, np.arange(self._size.answers - a)
        at.targets[:a] = layout.targets_A
        if work.weights is not None:
            at.weights[:a] = work.answer_weights()
        rows, in_parts, prefixes = (bounds_of(one) for one in stretch_lengths(layout.parts))
        for buffer, bounds, end in (
            (at.rows, rows, self._size.tokens),
            (at.parts, in_parts, self._size.tokens),
            (at.prefixes, prefixes, self._size.prefix_tokens),
        ):
            buffer[: len(bounds)], buffer[len(bounds) :], buffer[-1] = bounds, bounds[-1], end
        at.rows[len(rows) :] = self._size.tokens
        places, alone = prefix_places(layout.parts)
        at.places[: len(places)], at.places[len(places) :] = (
            places,
            t + np.arange(len(at.places) - len(places)),
        )
        at.alone[:t], at.alone[t:] = alone, True
        spans = [(part.start, part.end) for part in layout.parts]
        tiles, bounds, limits, keys, factors = lora_kernels.pass_arrays(spans, work.dropouts)
        tail_starts = np.arange(t, self._size.tokens, lora_kernels.TILE_TOKENS)
        tail_tiles = np.stack(
            [
                np.full_like(tail_starts, self._size.parts),
                tail_starts,
                np.full_like(tail_starts, self._size.tokens),
            ],
            1,
        )
        tiles = np.concatenate([tiles, tail_tiles.flatten()])
        at.tiles.reshape(-1, 3)[:, 0] = self._size.parts
        for buffer, values in (
            (at.tiles, tiles),
            (at.bounds, bounds),
            (at.limits, limits),
            (at.keys, keys),
            (at.factors, factors),
        ):
            buffer[: len(values)] = values
        self._block.copy_(torch.from_numpy(host).pin_memory(), non_blocking=True)

    def _work(self) -> Tensor:
        # belongs to the stream it is made on
        anchor = torch.zeros((), device=self._bank.device, requires_grad=self._size.is_training)
        route = Route(anchor, lambda layer: [], self._pass_tables, self._layers.layers)
        with self._bank.switch.on_route(route), torch.autograd.set_multithreading_enabled(False):
            if not self._size.is_training:
                with torch.no_grad():
                    return answer_nll(self._bank.model, self._batch)
            nll_A = answer_nll(self._bank.model, self._batch)
            (nll_A * self._weights_A).sum().backward()  # type: ignore[no-untyped-call]
            return nll_A.detach()

    def _places(self) -> list[tuple[str, type, int, int]]:
        found, start = [], 0
        for name, (kind, length) in self._fields.items():
            end = start + length * np.dtype(kind).itemsize
            found.append((name, kind, start, end))
            start = _up_to(end, 16)
        return found

    def _host_block(self) -> np.ndarray:
        return np.zeros(_up_to(self._places()[-1][-1], 16), np.uint8)


def launch_bound_tokens(mean_parameters: float) -> int:
    """Tokens of a pass up to which a host is slower than a GPU, for linear layers of so many parameters."""
    return int(_LAUNCH_BOUND / max(1.0, mean_parameters))


def _up_to(count: int, grain: int) -> int:
    return -(-count // grain) * grain


def _power_of_2(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
