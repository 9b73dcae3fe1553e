"""Owns recorded passes: CUDA graphs of rounded sizes, made when a size first comes up, and played back.

A pass over a small model waits for its launches: a linear layer costs a host a millisecond of Python and launches,
forward and backward, whatever its size. A graph has none of them.

Shapes: A scored positions.
Source: https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs
"""

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.answer_nll import answer_nll
from qlora.lora.bank import AdapterBank
from qlora.lora.banked_linear import Route
from qlora.lora.tables import PassTables, make_bank_tables
from qlora.packed.stream import PackedBatch, Stretches
from qlora.pass_buffers import PassSize, block_bytes, buffer_fields, filled_block
from qlora.passes import Pass

_log = logging.getLogger(__name__)
# Tokens times parameters of a linear layer: above that, a host launches faster than a GPU works.
_LAUNCH_BOUND = 2e11
_MOST_RECORDINGS = 64
_FIRST_PAUSE_PASSES = 256  # after out of memory; every further pause is twice as long


class Recorder:
    """Recordings of a bank's passes, in one pool of memory: they never run at the same time.

    What can't be recorded is launched, and so are all passes of steps that are large enough to keep a GPU at work:
    launched passes don't share that pool, so the recordings are given back.
    """

    def __init__(self, bank: AdapterBank):
        self._bank = bank
        self._recordings: dict[PassSize, _Recording] = {}
        self._compiled: set[tuple[int, ...]] = set()
        self._refused: set[PassSize] = set()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # an allocator reuses memory on one stream only
        self._most_tokens = launch_bound_tokens(bank.mean_parameters)
        self._is_off, self._is_at_large_steps = False, False
        self._pause_passes, self._next_pause_passes = 0, _FIRST_PAUSE_PASSES
        self.seconds = {"compiling": 0.0, "recording": 0.0}

    def run(self, work: Pass, largest: int) -> Tensor | None:
        """Play a pass and return its NLL [A]; None if it has to be launched kernel by kernel.

        `largest`: tokens of its step's largest pass.
        """
        if self._is_off or self._is_paused() or self._is_large(largest, work.weights is not None):
            return None
        size = PassSize.of(work, self._bank)
        if size in self._refused:
            return None
        recording = self._recordings.pop(size, None) or self._recorded(size, work)
        if recording is None:
            return None
        self._recordings[size] = recording  # last in order: the first is the one not played for longest
        return recording.play(work)

    @property
    def num_recordings(self) -> int:
        """Count the sizes that are recorded."""
        return len(self._recordings)

    def stop(self) -> None:
        """Give the recordings' memory back and record no more."""
        self._is_off = True
        self._give_back()

    def pause(self) -> bool:
        """Give the recordings' memory back and record none for a while; returns whether there were any."""
        had = bool(self._recordings)
        if had:
            self._pause_passes, self._next_pause_passes = self._next_pause_passes, 2 * self._next_pause_passes
        self._give_back()
        return had

    def _is_paused(self) -> bool:
        if self._pause_passes == 0:
            return False
        self._pause_passes -= 1
        if self._pause_passes == 0:
            self._refused.clear()
        return True

    def _is_large(self, largest: int, is_training: bool) -> bool:
        if not is_training:  # holds little memory either way
            return largest > self._most_tokens
        was = self._is_at_large_steps
        self._is_at_large_steps = largest > self._most_tokens / (2 if was else 1)
        if self._is_at_large_steps and not was:
            self._give_back()
        return self._is_at_large_steps

    def _recorded(self, size: PassSize, work: Pass) -> "_Recording | None":
        if len(self._recordings) == _MOST_RECORDINGS:
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
        except (ValueError, torch.cuda.OutOfMemoryError) as error:
            # FlashAttention doesn't compute this, or there is no room for it: this size is launched.
            _log.warning("a pass of %d tokens is not recorded: %s", size.tokens, _first_line(error))
            self._refused.add(size)
            self._give_back()
        except Exception as error:
            # A model that waits for the GPU: the allocator may be left in the middle of a recording.
            _log.warning("passes are recorded no more: %s", _first_line(error))
            self.stop()
        return None

    @contextmanager
    def _counted(self, work: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[work] += time.monotonic() - started

    def _give_back(self) -> None:
        self._recordings.clear()
        self._pool = torch.cuda.graph_pool_handle()  # a pool goes with its last recording
        torch.cuda.empty_cache()


class _Recording:
    """A CUDA graph of a pass, and the buffers it reads: one block of memory, filled by one copy."""

    def __init__(self, bank: AdapterBank, size: PassSize):
        self._bank, self._size = bank, size
        self._block = torch.zeros(block_bytes(size), dtype=torch.uint8, device=bank.device)
        buffers = _tensor_views(size, self._block)
        self._batch = recorded_batch(size, buffers)
        self._pass_tables = recorded_pass_tables(size, buffers)
        nobody = [[None] * (size.parts + 1)] * bank.num_layers
        self._bank_tables = make_bank_tables(nobody, bank.device, size.rank)
        self._weights_A = buffers["weights"]
        self._graph = torch.cuda.CUDAGraph()
        self._nll_A = self._weights_A

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

    def play(self, work: Pass) -> Tensor:
        """Run a pass; returns its NLL [A]."""
        self.fill(work)
        unused = [None] * (self._size.parts + 1 - len(work.adapters))
        self._bank_tables.copy_(self._bank.tables_of([*work.adapters, *unused]))
        self._graph.replay()
        return self._nll_A[: len(work.layout.targets_A)].clone()

    def fill(self, work: Pass) -> None:
        """Put a pass into the buffers."""
        host = torch.from_numpy(filled_block(self._size, work))
        self._block.copy_(host.pin_memory(), non_blocking=True)

    def _work(self) -> Tensor:
        # The anchor belongs to the stream that it is made on.
        anchor = torch.zeros((), device=self._bank.device, requires_grad=self._size.is_training)
        route = Route(anchor, lambda layer: [], self._pass_tables, self._bank_tables.layers)
        with self._bank.switch.on_route(route), torch.autograd.set_multithreading_enabled(False):
            if not self._size.is_training:
                with torch.no_grad():
                    return answer_nll(self._bank.model, self._batch)
            nll_A = answer_nll(self._bank.model, self._batch)
            loss = (nll_A * self._weights_A).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return nll_A.detach()


def recorded_batch(size: PassSize, buffers: dict[str, Tensor]) -> PackedBatch:
    """Return the batch that a recording of a size works on, in its buffers."""
    stretches = Stretches(
        rows=buffers["rows"],
        parts=buffers["parts"],
        prefixes=buffers["prefixes"],
        longest_row=size.longest_row,
        longest_part=size.longest_part,
        longest_prefix=size.longest_prefix,
        prefix_places_P=buffers["places"],
        alone_T=buffers["alone"],
    )
    return PackedBatch(
        input_ids_T=buffers["ids"],
        position_ids_T=buffers["positions"],
        predictors_A=buffers["predictors"],
        targets_A=buffers["targets"],
        parts=(),
        longest=size.longest,
        known_stretches=stretches,
    )


def recorded_pass_tables(size: PassSize, buffers: dict[str, Tensor]) -> PassTables:
    """Return the kernels' tables of a recording of a size, in its buffers."""
    return PassTables(
        num_tiles=size.num_tiles,
        num_parts=size.parts,
        tiles=buffers["tiles"],
        bounds=buffers["bounds"],
        keys_T=buffers["keys"],
        drop_limits=buffers["limits"],
        keep_factors=buffers["factors"],
        has_dropout=size.has_dropout,
    )


def launch_bound_tokens(mean_parameters: float) -> int:
    """Return the tokens of a pass up to which a host is slower than a GPU, for linear layers of so many parameters."""
    return int(_LAUNCH_BOUND / max(1.0, mean_parameters))


def _tensor_views(size: PassSize, block: Tensor) -> dict[str, Tensor]:
    return {
        name: block[start:end].view(getattr(torch, np.dtype(kind).name))
        for name, (kind, start, end) in buffer_fields(size).items()
    }


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
