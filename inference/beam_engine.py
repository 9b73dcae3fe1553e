"""Owns the loop of the beam engine: prompts wait, join free slots, are searched together, leave when done.

This is continuous batching, as in Orca (https://www.usenix.org/conference/osdi22/presentation/yu), for beam
search. Prompts are prefilled in packed passes while others are in the middle of their search, and so choose
their first tokens; a prefill's beams are still alike. A decode step feeds one token of every beam of every
slot. There are as many slots as memory allows.

Refuses to know files, text and Ray.

Shapes: T tokens of a pass, E slots, K beams, J key-value heads, P prefix tokens, D head width, V vocabulary.
"""

import secrets
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from inference.batch import Batch, Ways, in_passes, pieces_of, share_slots
from inference.beam_search import SearchRules, SearchState, advance
from inference.cached_attention import (
    DecodePass,
    PrefillPass,
    Stretch,
    store_prefix,
    store_prompts,
    use_cached_attention,
)
from inference.kv_cache import CacheShape, KVCache
from inference.prefixes import Prefixes
from inference.room import FEWEST_ROWS, LIMITS, Limits, Room, rounded_own
from qlora.base.device import free_bytes
from qlora.packed.packing import shared_prefix_length
from qlora.packed.stream import Rows

_Found = Iterator[tuple[int, list[int]]]  # of prompts, as they are done: index, new tokens


@dataclass
class BeamSearcher:
    """A beam searcher for many prompts on one model, whose attention it takes over.

    seed: of the generators for sampling, which else are seeded at random. limits: the device's, if none are
    given. max_slots: in place of theirs. What is kept from one call to the next: the batch's memory, and the
    keys and values of the prefix.
    """

    model: Any
    rules: SearchRules
    seed: int | None = None
    max_slots: int | None = None
    limits: Limits | None = None
    room: Room = field(init=False)
    _kept: Batch | None = None
    _prefixes: Prefixes = field(init=False)
    _ways: Ways = field(default_factory=lambda: Ways.one(0))
    _shape: CacheShape = field(init=False)

    def __post_init__(self) -> None:
        use_cached_attention(self.model)
        self._shape = CacheShape.of(self.model)
        self._prefixes = Prefixes(self._shape, self.model.device)
        limits = self.limits or LIMITS[self.model.device.type]
        if self.max_slots is not None:
            limits = replace(limits, max_slots=self.max_slots)
        self.room = Room(self.model, self.rules, self._shape, limits)

    @torch.inference_mode()
    def search(
        self, prompts: Sequence[Sequence[int]], ways: Ways | None = None
    ) -> Generator[tuple[int, list[int]]]:
        """Yield (index, new tokens with the ending EOS) of each prompt, as they are done.

        Every prompt needs a token. Several parts are searched together where that takes fewer waves of
        prompts than one part after another. Only a call without ways keeps what the next may use. Out of
        memory halves the slots, and the other prompts go on. Raises OutOfMemoryError without room for one.
        """
        use_cached_attention(self.model)  # another engine may have worked with the model meanwhile
        self._ways = ways or Ways.one(len(prompts))
        self.room.look()
        try:
            for group in self._groups(prompts):
                yield from self._search_group(prompts, group)
        finally:
            if ways is not None:
                self.release()

    def release(self) -> None:
        """Give back what is kept from one call to the next."""
        self._kept, self._ways = None, Ways.one(0)
        self._prefixes = Prefixes(self._shape, self.model.device)
        self.room.restore()  # there may be more memory next time

    def _groups(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the places of the prompts that are searched together."""
        by_part: dict[int, list[int]] = {}
        for place, part in enumerate(self._ways.parts):
            by_part.setdefault(part, []).append(place)

        def waves(places: list[int], num_shared: int) -> int:
            longest = max(len(prompts[place]) for place in places)
            return -(-len(places) // self.room.num_slots(len(places), longest - num_shared))

        groups = list(by_part.values())
        if len(groups) < 2:
            return groups
        together = [place for group in groups for place in group]
        shared = [shared_prefix_length([tuple(prompts[place]) for place in group]) for group in groups]
        one_by_one = sum(map(waves, groups, shared))
        return [together] if waves(together, 0) < one_by_one else groups

    def _search_group(self, prompts: Sequence[Sequence[int]], group: list[int]) -> _Found:
        """Search for some of the prompts, with fewer slots each time that memory runs out."""
        left = set(group)
        while left:
            names = sorted(left)
            try:
                for index, tokens in self._search([prompts[i] for i in names], names):
                    left.discard(index)
                    yield index, tokens
            except torch.cuda.OutOfMemoryError:
                self._kept = None
                torch.cuda.empty_cache()
                if not self.room.halve():
                    raise

    def _search(self, prompts: list[Sequence[int]], names: list[int]) -> _Found:
        """Search for prompts, longest first; yield name and new tokens of each, as they are done.

        Slots belong to parts, so that where there are fewer slots than parts, the last ones are left out.
        """
        parts = [self._ways.parts[name] for name in names]
        counts = Counter(parts)
        of_part = {
            part: [tuple(one) for one, own in zip(prompts, parts, strict=True) if own == part]
            for part in counts
        }
        prefixes = self._prefixes.of(of_part, self.room.prefill_tokens(), self._fill)
        # One part's prefix is there once for all slots; of several, each slot has a copy of its part's.
        of_all = prefixes[parts[0]] if len(counts) == 1 else self._prefixes.blank()
        own_lengths = [len(prompt) - of_all.shape[3] for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: (-own_lengths[i], i))
        batch = self._make_batch(of_all, counts, max(own_lengths))
        waiting = {part: deque(i for i in order if parts[i] == part) for part in sorted(set(batch.parts))}
        while any(waiting.values()) or any(example is not None for example in batch.examples):
            free = batch.free
            places = [slot for part, slots in batch.by_part(free) for slot in slots[: len(waiting[part])]]
            # Prompts join an eighth of the slots at a time, so that a prefill is worth its launches.
            could_join = sum(min(len(queue), batch.parts.count(part)) for part, queue in waiting.items())
            if places and len(places) >= min(could_join, max(1, len(batch.examples) // 8)):
                joining = [waiting[batch.parts[slot]].popleft() for slot in places]
                self._join(batch, places, joining, prompts, prefixes)
            elif not any(waiting.values()) and self._shrinks(batch, len(free)):
                batch = batch.keep([slot for slot in range(len(batch.examples)) if slot not in free])
            is_under_way = self._goes_on(batch) and self._step(batch)
            for example, tokens in batch.take_done(is_under_way):
                yield names[example], tokens

    def _shrinks(self, batch: Batch, num_free: int) -> bool:
        """Tell whether to make the batch smaller: enough slots are free, and there is room for a copy."""
        num_slots = len(batch.examples)
        device = self.model.device
        is_small = num_slots * self.rules.num_beams <= FEWEST_ROWS[device.type]
        if is_small or num_free < num_slots * self.room.limits.shrink_at:
            return False
        copy_bytes = batch.cache.num_bytes * (num_slots - num_free) // num_slots
        return copy_bytes < 0.8 * free_bytes(device)

    def _goes_on(self, batch: Batch) -> bool:
        """Tell whether a search may not have ended, as far as their steps tell."""
        return any(
            example is not None and steps < self.rules.max_new_tokens
            for example, steps in zip(batch.examples, batch.steps, strict=True)
        )

    def _step(self, batch: Batch) -> bool:
        """Feed every slot's next tokens and choose the tokens after them.

        On a GPU the step is recorded once for each batch, and then replayed; it is launched while the one
        before it runs, since a launch takes as long as the step of a small model. Returns whether it may
        still run.
        """
        if batch.way is None:
            fed = [batch.state.next_EK.shape[1]] * len(batch.parts)
            batch.way = self._ways.way_of(pieces_of(batch.parts, fed))
        if batch.state.done_E.is_cuda and not self.rules.do_sample:
            if batch.graph is None:
                with batch.way():
                    batch.graph = self._record(batch)
            batch.graph.replay()
            batch.give_notice()
        else:
            taken = [
                steps
                for steps, example in zip(batch.steps, batch.examples, strict=True)
                if example is not None
            ]
            with batch.way():
                self._feed(batch, max(taken))
        batch.steps = [steps + 1 for steps in batch.steps]
        return batch.graph is not None

    def _feed(self, batch: Batch, num_steps: int) -> None:
        """Run a decode step by launching each kernel. `num_steps`: see DecodePass."""
        fed = DecodePass(batch.cache, batch.state, num_steps)
        logits_TV = self._forward(batch.state.next_EK.flatten(), fed.positions().flatten(), fed)
        advance(batch.state, logits_TV.view(*batch.state.next_EK.shape, -1), self.rules, batch.generators)

    def _record(self, batch: Batch) -> torch.cuda.CUDAGraph:
        """Record a decode step at the most steps; what the warm-up changes is restored."""
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

    def _join(
        self,
        batch: Batch,
        slots: list[int],
        joining: list[int],
        prompts: list[Sequence[int]],
        prefixes: Mapping[int, Tensor],
    ) -> None:
        """Put prompts into slots: prefill them in packed passes, and choose their first tokens."""
        device = batch.state.done_E.device
        p = batch.cache.prefix.shape[3]
        places = torch.tensor(slots, device=device)
        own_lengths = torch.tensor([len(prompts[i]) - p for i in joining], device=device)
        batch.cache.own_E.index_copy_(0, places, own_lengths)
        if p == 0:  # else all slots have it already
            for part, own_slots in batch.by_part(slots):
                store_prefix(batch.cache, torch.tensor(own_slots, device=device), prefixes[part])
        lengths = [prefixes[batch.parts[slot]].shape[3] for slot in slots]
        behind = [prompts[i][length:] for i, length in zip(joining, lengths, strict=True)]
        filled = list(zip(slots, behind, strict=True))
        logits = [
            self._prefill(batch, filled[run.start : run.stop], prefixes)
            for run in in_passes([len(own) for own in behind], self.room.prefill_tokens())
        ]
        for slot, i in zip(slots, joining, strict=True):
            batch.examples[slot] = i
            batch.steps[slot] = 1
            if self.rules.do_sample:
                batch.generators[slot] = torch.Generator(device)
                batch.generators[slot].manual_seed(secrets.randbits(63) if self.seed is None else self.seed)
        generators = [batch.generators[slot] for slot in slots]
        batch.state.start(places, torch.cat(logits), self.rules, generators)

    def _prefill(
        self, batch: Batch, filled: Sequence[tuple[int, Sequence[int]]], prefixes: Mapping[int, Tensor]
    ) -> Tensor:
        """Compute keys and values of prompts behind their parts' prefixes in a packed pass, and keep them.

        `filled`: slots, by part, and the tokens that each one's prompt has behind the prefix, at least one.
        Returns the logits [n, V] of their last tokens.
        """
        device, stretches, positions = self.model.device, list[tuple[int, Stretch]](), list[int]()
        for part, alike in groupby(filled, lambda one: batch.parts[one[0]]):
            slots, owns = zip(*alike, strict=True)
            prefix = prefixes[part]
            p = prefix.shape[3]
            rows = Rows(tuple(map(len, owns)), p, device)
            places = torch.tensor(slots, device=device)
            store = store_prompts(batch.cache, places, rows, p - batch.cache.prefix.shape[3])
            stretches.append((part, Stretch(prefix, rows, store)))
            positions += [p + place for length in rows.lengths for place in range(length)]
        return self._fill(stretches, [token for _, own in filled for token in own], positions)

    def _fill(
        self, stretches: Sequence[tuple[int, Stretch]], tokens: list[int], positions: list[int]
    ) -> Tensor:
        """Run a pass through each part's adapter, and return the logits of the rows' last tokens."""
        device = self.model.device
        last = [place - 1 for place in accumulate(n for _, one in stretches for n in one.rows.lengths)]
        lengths = [one.rows.num_tokens for _, one in stretches]
        with self._ways.way_of(pieces_of([part for part, _ in stretches], lengths))():
            return self._forward(
                torch.tensor(tokens, device=device),
                torch.tensor(positions, device=device),
                PrefillPass([one for _, one in stretches]),
                torch.tensor(last, device=device),
            )

    def _make_batch(self, prefix: Tensor, counts: Mapping[int, int], max_own: int) -> Batch:
        """Return a batch of free slots with room for `max_own` prompt tokens; use the kept one if it fits.

        `counts`: how many prompts each part has.
        """
        rules = self.rules
        device = prefix.device
        max_own = rounded_own(max_own)
        kept_bytes = self._kept.cache.num_bytes if self._kept is not None else 0
        parts = share_slots(self.room.num_slots(sum(counts.values()), max_own, kept_bytes), counts)
        num_slots = len(parts)
        kept = self._kept
        fits = kept is not None and kept.cache.prefix is prefix and kept.parts == parts
        if kept is None or not fits or kept.cache.room != (num_slots, max_own):
            self._kept = kept = None  # its memory is freed before the next one's is taken
            kept = Batch(
                cache=KVCache.empty(
                    self._shape, prefix, num_slots, rules.num_beams, max_own, rules.max_new_tokens
                ),
                state=SearchState.empty(num_slots, rules, device),
                parts=parts,
                examples=[None] * num_slots,
                steps=[0] * num_slots,
                generators=[torch.Generator(device)] * num_slots,
            )
            self._kept = kept
        kept.clear()  # a search that was broken off may have left some
        return kept

    def _forward(self, tokens_T: Tensor, positions_T: Tensor, cached: Any, kept: Tensor | int = 0) -> Tensor:
        """Run one pass and return the logits of all its tokens, or those at the places `kept`."""
        return self.model(
            input_ids=tokens_T[None],
            position_ids=positions_T[None],
            cached=cached,
            use_cache=False,
            logits_to_keep=kept,
        ).logits[0]
