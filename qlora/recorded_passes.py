"""Owns recorded passes: CUDA graphs of rounded sizes, recorded when passes need them, and replayed.

A pass over a small model waits for its launches: a linear layer costs the host a millisecond of Python and
kernel launches, forward and backward, whatever its size. A CUDA graph is recorded once and launched as a
whole, without any of them. It reads fixed buffers (qlora.pass_buffers), into which each pass is written
before it is replayed.

Refuses to know schedules, metrics and trials.

Shapes: A scored positions.
Source: https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs
"""

import gc
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.answer_nll import answer_nll
from qlora.base.compiling import compile_unless_known
from qlora.config import first_line
from qlora.lora.bank import AdapterBank
from qlora.lora.banked_linear import Route
from qlora.lora.tables import PassTables, make_bank_tables
from qlora.packed.stream import PackedBatch, Stretches
from qlora.pass_buffers import PassSize, block_bytes, buffer_fields, filled_block
from qlora.passes import Pass, launch

_log = logging.getLogger(__name__)
# Tokens times parameters of a linear layer, above which a host launches faster than a GPU works.
_LAUNCH_BOUND = 2e11
_MOST_RECORDINGS = 64
# Passes of a size that are replayed in a larger recording: each costs a tenth of a pass or so, a recording of
# its own as much as several passes.
_MOST_TIMES = 24
_FIRST_PAUSE_PASSES = 256  # after out of memory; every further pause is twice as long


class Recorder:
    """The recordings of a bank's passes, which share a pool of memory: they never run at the same time.

    A pass that can't be recorded is launched kernel by kernel. So are all passes of steps that are large
    enough to keep a GPU at work: launched passes can't use the pool's memory, so then the recordings are
    given back.
    """

    def __init__(self, bank: AdapterBank):
        self._bank = bank
        self._recordings: dict[PassSize, _Recording] = {}
        self._rehearsed: set[tuple[int, ...]] = set()  # what kernels were compiled for, and run once
        self._compiled: set[tuple[int, ...]] = set()  # likewise, for passes that are launched
        self._refused: set[PassSize] = set()
        self._times: Counter[PassSize] = Counter()  # that a size came up and was not recorded
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # an allocator reuses memory on one stream only
        self._most_tokens = launch_bound_tokens(bank.mean_parameters)
        self._is_off = False
        self._is_at_large_steps = False
        self._pause_passes = 0  # passes that are still to be launched before the next one is recorded
        self._next_pause_passes = _FIRST_PAUSE_PASSES
        self.seconds = {"compiling": 0.0, "recording": 0.0}

    def run(self, work: Pass, largest: int) -> Tensor | None:
        """Replay a pass and return its NLL [A]; return None if it has to be launched kernel by kernel.

        `largest` is the number of tokens of its step's largest pass.
        """
        is_training = work.weights is not None
        if self._is_off or self._is_paused() or self._is_large(largest, is_training):
            return None
        size = PassSize.of(work, self._bank)
        if size in self._refused:
            return None
        found = size if size in self._recordings else self._larger(size, work)
        recording = self._recorded(size, work) if found is None else self._recordings.pop(found)
        if recording is None:
            return None
        # Last in order, so that the first is the one not replayed for longest.
        self._recordings[found or size] = recording
        return recording.play(work)

    def compile(self, work: Pass) -> None:
        """Compile the kernels of a pass that is about to be launched, if there was none like it."""
        made_for = PassSize.of(work, self._bank).kernels
        if made_for not in self._compiled:
            with self._counted("compiling"):
                compile_unless_known(lambda: launch(self._bank, work))
            self._compiled.add(made_for)

    @property
    def num_recordings(self) -> int:
        """Count the recordings that are kept, one for each size."""
        return len(self._recordings)

    def stop(self) -> None:
        """Give the recordings' memory back and record no more."""
        self._is_off = True
        self._give_back()

    def pause(self) -> bool:
        """Give the recordings' memory back and record none for a while; tell whether there were any."""
        had_recordings = bool(self._recordings)
        if had_recordings:
            self._pause_passes = self._next_pause_passes
            self._next_pause_passes *= 2
        self._give_back()
        return had_recordings

    def _is_paused(self) -> bool:
        """Tell whether a pass falls into a pause, and count it."""
        if self._pause_passes == 0:
            return False
        self._pause_passes -= 1
        if self._pause_passes == 0:
            self._refused.clear()
        return True

    def _is_large(self, largest: int, is_training: bool) -> bool:
        """Tell whether a pass belongs to a step that is large enough to keep a GPU at work.

        Training that is at large steps leaves them only for steps of half that size, so that sizes around the
        limit don't make it record and give back in turn.
        """
        if not is_training:  # holds little memory either way
            return largest > self._most_tokens
        was_at_large_steps = self._is_at_large_steps
        most_tokens = self._most_tokens / 2 if was_at_large_steps else self._most_tokens
        self._is_at_large_steps = largest > most_tokens
        if self._is_at_large_steps and not was_at_large_steps:
            self._give_back()
        return self._is_at_large_steps

    def _larger(self, size: PassSize, work: Pass) -> PassSize | None:
        """Return the smallest recorded size that holds a pass of a size that is not recorded.

        None if there is none, and for a size that comes up often: its own recording wastes less.
        """
        self._times[size] += 1
        if self._times[size] > _MOST_TIMES:
            return None
        fitting = (one for one in self._recordings if one.holds(work, size))
        return min(fitting, key=lambda one: one.tokens, default=None)

    def _recorded(self, size: PassSize, work: Pass) -> "_Recording | None":
        """Record a size, given its first pass; return None if that fails, and don't try again.

        Where others leave no memory for it, they are given back: launched beside them, it would find none
        either.
        """
        if len(self._recordings) == _MOST_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        try:
            return self._record(size, work)
        except (ValueError, torch.cuda.OutOfMemoryError) as error:
            is_tried_again = bool(self._recordings) and isinstance(error, torch.cuda.OutOfMemoryError)
            self._give_back()
            if not is_tried_again:
                # FlashAttention doesn't compute this, or there is no room for it: this size is launched.
                _log.warning("a pass of %d tokens is not recorded: %s", size.tokens, first_line(error))
                self._refused.add(size)
                return None
        except Exception as error:
            # The model waits for the GPU, which can't be recorded. The allocator may be left half way.
            _log.warning("passes are recorded no more: %s", first_line(error))
            self.stop()
            return None
        return self._recorded(size, work)

    def _record(self, size: PassSize, work: Pass) -> "_Recording":
        """Record a size, given its first pass."""
        recording = _Recording(self._bank, size)
        recording.fill(work)
        if size.kernels not in self._rehearsed:
            with self._counted("compiling"):
                recording.rehearse(self._stream)
            self._rehearsed.add(size.kernels)
        with self._counted("recording"):
            recording.record(self._pool, self._stream)
        return recording

    @contextmanager
    def _counted(self, work: str) -> Iterator[None]:
        """Add the time that is spent within to the seconds of this kind of work."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[work] += time.monotonic() - started

    def _give_back(self) -> None:
        """Free the recordings and their memory."""
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
        no_adapters = [[None] * (size.parts + 1)] * bank.num_layers
        self._bank_tables = make_bank_tables(no_adapters, bank.device, size.rank, size.odd_ranks)
        self._weights_A = buffers["weights"]
        self._graph = torch.cuda.CUDAGraph()
        self._nll_A = self._weights_A

    def rehearse(self, stream: torch.cuda.Stream) -> None:
        """Compile the pass's kernels and run it once without adapters: a recording can't contain that."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compile_unless_known(self._work)
            self._work()
        torch.cuda.synchronize()

    def record(self, pool: Any, stream: torch.cuda.Stream) -> None:
        """Record the pass, whose kernels are compiled, in a pool of memory."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # while recording, the allocator can't free what it keeps for other passes
        was_collecting = gc.isenabled()
        gc.disable()  # a recording that is freed meanwhile would spoil this one
        try:
            with torch.cuda.stream(stream):
                self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    self._nll_A = self._work()
                finally:
                    self._graph.capture_end()
        finally:
            if was_collecting:
                gc.enable()

    def play(self, work: Pass) -> Tensor:
        """Replay a pass; return its NLL [A]."""
        self.fill(work)
        unused = [None] * (self._size.parts + 1 - len(work.adapters))
        self._bank_tables.copy_(self._bank.tables_of([*work.adapters, *unused]))
        self._graph.replay()
        return self._nll_A[: len(work.layout.targets_A)].clone()

    def fill(self, work: Pass) -> None:
        """Write a pass into the buffers."""
        host = torch.from_numpy(filled_block(self._size, work))
        self._block.copy_(host.pin_memory(), non_blocking=True)

    def _work(self) -> Tensor:
        """Run the pass in its buffers, as `qlora.passes.launch` does; return its NLL [A]."""
        # The anchor belongs to the stream that it is made on.
        anchor = torch.zeros((), device=self._bank.device, requires_grad=self._size.is_training)
        route = Route(
            anchor=anchor,
            parts_at=lambda layer: [],
            pass_tables=self._pass_tables,
            layer_tables=self._bank_tables.layers,
        )
        with self._bank.switch.on_route(route), torch.autograd.set_multithreading_enabled(False):
            if not self._size.is_training:
                with torch.no_grad():
                    return answer_nll(self._bank.model, self._batch)
            nll_A = answer_nll(self._bank.model, self._batch)
            loss = (nll_A * self._weights_A).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return nll_A.detach()


def recorded_batch(size: PassSize, buffers: dict[str, Tensor]) -> PackedBatch:
    """Return the batch that a recording of a size works on; its tensors are the recording's buffers."""
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
    """Return the kernels' tables of a recording of a size; their tensors are the recording's buffers."""
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
    """Return the most tokens of a pass for which a host launches more slowly than a GPU works.

    `mean_parameters` is the mean number of parameters of the model's linear layers.
    """
    return int(_LAUNCH_BOUND / max(1.0, mean_parameters))


def _tensor_views(size: PassSize, block: Tensor) -> dict[str, Tensor]:
    """Return the buffers of a block of bytes as tensors, by name."""
    views = {}
    for name, (kind, start, end) in buffer_fields(size).items():
        dtype = getattr(torch, np.dtype(kind).name)
        views[name] = block[start:end].view(dtype)
    return views
