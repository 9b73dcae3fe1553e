"""Owns the loop of the beam engine: prompts wait, join free slots, are searched together, leave when they are done.

A step feeds one token of every beam of every slot. Prompts join in packed passes while others are in the middle of their
search; the last token of a prompt is not prefilled but fed as the first step, so that joining needs no logits. Slots are
as many as memory allows. Refuses to know files, text and Ray.
"""

import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inference.beam_search import SearchRules, SearchState, advance
from inference.kv_cache import (
    CacheShape,
    DecodePass,
    KVCache,
    PrefillPass,
    store_prompts,
    use_cached_attention,
)
from qlora.base.device import free_bytes
from qlora.packed.packing import shared_prefix_length
from qlora.packed.stream import Rows

_MAX_SLOTS = {"cpu": 32, "cuda": 128}
# share of free slots at which the rest move closer; a GPU then records its step anew
_SHRINK_AT = {"cpu": 0.25, "cuda": 0.5}
_PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384}


@dataclass
class Batch:
    """Slots at work. `examples` has the prompt index of each slot, None for a free one; `steps` what each has fed."""

    cache: KVCache
    state: SearchState
    examples: list[int | None]
    steps: list[int]
    generators: list[torch.Generator]
    graph: torch.cuda.CUDAGraph | None = None

    @property
    def free(self) -> list[int]:
        """Slots without an example."""
        return [slot for slot, example in enumerate(self.examples) if example is None]

    def keep(self, slots: list[int]) -> "Batch":
        """Some slots alone."""
        chosen = torch.tensor(slots, device=self.state.done_E.device)
        return Batch(
            self.cache.keep(chosen),
            self.state.keep(chosen),
            [self.examples[slot] for slot in slots],
            [self.steps[slot] for slot in slots],
            [self.generators[slot] for slot in slots],
        )


@dataclass
class BeamSearcher:
    """Searches for many prompts with one model, whose attention it takes over."""

    model: Any
    rules: SearchRules
    seed: int | None = None
    max_slots: int | None = None
    _kept: Batch | None = None
    _prefix_tokens: tuple[int, ...] = ()
    _prefix: Tensor | None = None
    _shape: CacheShape = field(init=False)

    def __post_init__(self) -> None:
        use_cached_attention(self.model)
        self._shape = CacheShape.of(self.model)
        self.max_slots = self.max_slots or _MAX_SLOTS[self.model.device.type]

    @torch.inference_mode()
    def search(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
        """(index, new tokens with the ending EOS) of each prompt, as they are done. Every prompt needs a token.

        Out of memory halves the slots and goes on with the prompts that are not done.
        """
        use_cached_attention(self.model)  # another engine may have worked with the model meanwhile
        left = set(range(len(prompts)))
        while left:
            try:
                for index, tokens in self._search([prompts[i] for i in sorted(left)], sorted(left)):
                    left.discard(index)
                    yield index, tokens
            except torch.cuda.OutOfMemoryError:
                assert self.max_slots is not None
                if self.max_slots == 1:
                    raise
                self.max_slots //= 2
                self._kept = None
                torch.cuda.empty_cache()

    def _search(self, prompts: list[Sequence[int]], names: list[int]) -> Iterator[tuple[int, list[int]]]:
        prefix = self._prefix_of([tuple(prompt) for prompt in prompts])
        p = prefix.shape[3]
        owns = [len(prompt) - p - 1 for prompt in prompts]
        waiting = deque(sorted(range(len(prompts)), key=lambda i: (-owns[i], i)))
        batch = self._make_batch(prefix, len(prompts), max(owns))
        while waiting or any(example is not None for example in batch.examples):
            free = batch.free
            if waiting and len(free) >= min(len(waiting), max(1, len(batch.examples) // 8)):
                joining = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
                self._join(batch, free[: len(joining)], joining, prompts)
            elif not waiting and self._shrinks(batch, len(free)):
                batch = batch.keep(
                    [slot for slot, example in enumerate(batch.examples) if example is not None]
                )
            self._step(batch)
            for slot in [
                slot
                for slot, done in enumerate(batch.state.done_E.tolist())
                if done and batch.examples[slot] is not None
            ]:
                example = batch.examples[slot]
                assert example is not None
                length = int(batch.state.best_lengths_EK[slot, 0])
                batch.examples[slot] = None
                yield names[example], batch.state.best_tokens_EKT[slot, 0, :length].tolist()

    def _shrinks(self, batch: Batch, num_free: int) -> bool:
        """Whether the slots at work should move closer: enough are free, and there is room for a copy."""
        num_slots, device = len(batch.examples), self.model.device
        enough = num_free >= num_slots * _SHRINK_AT[device.type]
        return enough and batch.cache.num_bytes * (num_slots - num_free) // num_slots < 0.8 * free_bytes(
            device
        )

    def _step(self, batch: Batch) -> None:
        """Feed every slot's next tokens and choose those after them. On a GPU the step is recorded once a batch, then replayed."""
        num_steps = 1 + max(
            steps for steps, example in zip(batch.steps, batch.examples, strict=True) if example is not None
        )
        if batch.state.done_E.is_cuda and not self.rules.do_sample:
            if batch.graph is None:
                batch.graph = self._record(batch)
            batch.graph.replay()
        else:
            self._feed(batch, num_steps)
        batch.steps = [steps + 1 for steps in batch.steps]

    def _feed(self, batch: Batch, num_steps: int) -> None:
        fed = DecodePass(batch.cache, batch.state, num_steps)
        logits_TV = self._forward(batch.state.next_EK.flatten(), fed.positions().flatten(), fed)
        advance(batch.state, logits_TV.view(*batch.state.next_EK.shape, -1), self.rules, batch.generators)

    def _record(self, batch: Batch) -> torch.cuda.CUDAGraph:
        """A graph of one step at the most steps; what the warm-up changes is put back."""
        before = batch.state.keep(torch.arange(len(batch.examples), device=batch.state.done_E.device))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._feed(batch, self.rules.max_new_tokens)
        torch.cuda.current_stream().wait_stream(side)
        batch.state.restore(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._feed(batch, self.rules.max_new_tokens)
        return graph

    def _join(self, batch: Batch, slots: list[int], joining: list[int], prompts: list[Sequence[int]]) -> None:
        """Prefill prompts (all but the last token) into slots, in packed passes of bounded size, and start their searches."""
        device, p = batch.state.done_E.device, batch.cache.prefix.shape[3]
        places = torch.tensor(slots, device=device)
        own_lengths = [len(prompts[i]) - p - 1 for i in joining]
        batch.cache.own_E.index_copy_(0, places, torch.tensor(own_lengths, device=device))
        batch.state.start(places, torch.tensor([prompts[i][-1] for i in joining], device=device), self.rules)
        budget = _PREFILL_TOKENS[device.type]
        start = 0
        # longest first: behind an empty one all are empty
        while start < len(joining) and own_lengths[start] > 0:
            end = start + 1
            while end < len(joining) and own_lengths[end] > 0 and sum(own_lengths[start : end + 1]) <= budget:
                end += 1
            rows = Rows(tuple(own_lengths[start:end]), p, device)
            tokens = [token for i in joining[start:end] for token in prompts[i][p:-1]]
            positions = [position for length in own_lengths[start:end] for position in range(p, p + length)]
            self._forward(
                torch.tensor(tokens, device=device),
                torch.tensor(positions, device=device),
                PrefillPass(batch.cache.prefix, rows, store_prompts(batch.cache, places[start:end], rows)),
                logits=False,
            )
            start = end
        for slot, i in zip(slots, joining, strict=True):
            batch.examples[slot], batch.steps[slot] = i, 0
            if self.rules.do_sample:
                batch.generators[slot] = torch.Generator(device)
                batch.generators[slot].manual_seed(secrets.randbits(63) if self.seed is None else self.seed)

    def _prefix_of(self, prompts: list[tuple[int, ...]]) -> Tensor:
        """Keys and values of what all prompts begin with, [2, layers, J, P, D]; kept for the next call with the same template."""
        common = prompts[0][: shared_prefix_length(prompts)]
        kept = self._prefix_tokens
        if self._prefix is None or common[: len(kept)] != kept or 4 * len(kept) < 3 * len(common):
            device, shape = self.model.device, self._shape
            empty = torch.zeros(
                2, shape.num_layers, shape.num_kv_heads, 0, shape.head_dim, dtype=shape.dtype, device=device
            )
            prefix = empty.new_zeros(2, shape.num_layers, shape.num_kv_heads, len(common), shape.head_dim)
            if common:

                def store(layer: int, k_TJD: Tensor, v_TJD: Tensor) -> None:
                    prefix[:, layer] = torch.stack([k_TJD, v_TJD]).transpose(1, 2)

                tokens = torch.tensor(common, device=device)
                self._forward(
                    tokens,
                    torch.arange(len(common), device=device),
                    PrefillPass(empty, Rows((len(common),), 0, device), store),
                    logits=False,
                )
            self._prefix_tokens, self._prefix = common, prefix
        return self._prefix

    def _make_batch(self, prefix: Tensor, num_examples: int, max_own: int) -> Batch:
        rules, device = self.rules, prefix.device
        max_own = -(-max(1, max_own) // 64) * 64
        num_slots = self._num_slots(num_examples, max_own)
        if (
            self._kept is None
            or self._kept.cache.prefix is not prefix
            or self._kept.cache.prompts.shape[2:5:2] != (num_slots, max_own)
        ):
            self._kept = None  # its memory is free before the next one's is taken
            cache = KVCache.empty(
                self._shape, prefix, num_slots, rules.num_beams, max_own, rules.max_new_tokens
            )
            self._kept = Batch(
                cache,
                SearchState.empty(num_slots, rules, device),
                [None] * num_slots,
                [0] * num_slots,
                [torch.Generator(device)] * num_slots,
            )
        # a search that was broken off may have left some
        self._kept.examples = [None] * num_slots
        return self._kept

    def _num_slots(self, num_examples: int, max_own: int) -> int:
        """As many as memory holds, at most `max_slots`, evened out so that the last wave is as full as the first."""
        assert self.max_slots is not None
        vocabulary = self.model.config.get_text_config().vocab_size
        cached = self._shape.bytes_per_token * (max_own + self.rules.max_new_tokens * self.rules.num_beams)
        # the model's, in float32, without early EOS, and room to work
        logits = 16 * vocabulary * self.rules.num_beams
        kept = self._kept.cache.num_bytes if self._kept is not None else 0
        fitting = max(1, int(0.8 * (free_bytes(self.model.device) + kept)) // (cached + logits))
        most = min(self.max_slots, fitting, num_examples)
        waves = -(-num_examples // most)
        return -(-num_examples // waves)

    def _forward(self, tokens_T: Tensor, positions_T: Tensor, cached: Any, logits: bool = True) -> Tensor:
        """Logits [T, V] of one pass; without `logits` of its last token only."""
        return self.model(
            input_ids=tokens_T[None],
            position_ids=positions_T[None],
            cached=cached,
            use_cache=False,
            logits_to_keep=0 if logits else 1,
        ).logits[0]
