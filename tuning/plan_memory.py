"""Owns the memory that training takes of a device, counted from a base's numbers before any of it is there.

It is counted, not guessed: base, adapters with gradients and Adam's two moments, what layers keep of a token
for their backward, and logits. Passes that are recorded have rounded sizes (qlora.pass_buffers).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from qlora.config import TrialSettings
from qlora.data.prompts import EncodedExample
from qlora.lora.tables import padded_rank
from qlora.packed.packing import whole_group
from qlora.pass_buffers import rounded_up
from qlora.recorded_passes import launch_bound_tokens
from tuning.device import Device
from tuning.model_size import ModelSize
from tuning.samplers import drawn_values
from tuning.space import Space

ADAPTER_BYTES = 16  # a parameter: float32 weight, gradient and two moments; plus a copy in the model's dtype
_NF4_BYTES = 0.516  # a parameter: half a byte, and doubly quantised scales for blocks of 64
_LOGIT_BYTES = 12  # float32, in a backward: their log-softmax, its gradient and their own
_RESERVE_BYTES = 2 << 30  # a CUDA context and its libraries
_PLAYS, _MOST_DRAWN = 32, 1024  # sweeps that are drawn, to see how much their adapters take; trials of all


class TextsMemory(Protocol):
    """Counts the bytes of texts that trials write in between, if the objective is of such."""

    def count(self, kind: str, number_bytes: int, num_adapters: int, free: int) -> int:
        """Return what the texts of so many trials take at once, on a kind of device with so much left."""


@dataclass(frozen=True)
class TrainingMemory:
    """Counts what trials of a space take of a device, in bytes.

    recomputes: layers are computed again in the backward (qlora.base.recomputed).
    """

    space: Space
    train: Sequence[EncodedExample]
    size: ModelSize
    device: Device
    recomputes: bool = False

    @property
    def free(self) -> int:
        """Return what there is for trials and their base."""
        return self.device.free_bytes - (_RESERVE_BYTES if self._is_on_gpu else 0)

    @cached_property
    def keeps_nf4(self) -> bool:
        """Tell whether the base stays in NF4: half of the free memory has no room for its values."""
        dense = self.size.linear * self._width
        return self.space.base_model.quantization == "nf4" and 2 * dense >= self.free

    @cached_property
    def base(self) -> int:
        """Return what the base takes."""
        linear = self.size.linear * (_NF4_BYTES if self.keeps_nf4 else self._width)
        return self.size.other * self._width + int(linear)

    @cached_property
    def adapter(self) -> int:
        """Return what a trial takes with what training needs beside its adapter, at most."""
        sizes = map(self.size.adapter_parameters, self._settings_by_rank(max))
        return self._bytes_of_parameter * max(sizes)

    @cached_property
    def mean_adapter(self) -> float:
        """Return the same of a trial with middling settings."""
        return self._bytes_of_parameter * self.mean_weights

    @cached_property
    def mean_weights(self) -> float:
        """Return how many weights the adapter of such a trial has."""
        return statistics.fmean(map(self.size.adapter_parameters, self._settings_by_rank(statistics.fmean)))

    def fullest_adapters(self, trials: int, num_trials: int) -> int:
        """Return what adapters take when so many side by side take most, on average over sweeps of that kind.

        One trial of a device's `num_trials` follows another: the fewer there are at once, the farther is the
        fullest moment from the middling one.
        """
        num_trials = max(trials, min(num_trials, _MOST_DRAWN))
        drawn = self._drawn_adapters(num_trials * max(1, min(_PLAYS, _MOST_DRAWN // num_trials)))
        plays = [drawn[first : first + num_trials] for first in range(0, len(drawn), num_trials)]
        fullest = [
            max(sum(play[first : first + trials]) for first in range(num_trials - trials + 1))
            for play in plays
        ]
        return int(self._bytes_of_parameter * statistics.fmean(fullest))

    @cached_property
    def step_tokens(self) -> int:
        """Return the stream tokens of an optimizer step on examples of average length."""
        group = whole_group(self.train)
        own = (group.num_tokens - group.prefix_length) / len(self.train)
        return math.ceil(group.prefix_length + own * min(self._batch_size, len(self.train)))

    @cached_property
    def longest_example(self) -> int:
        """Return the tokens of the longest example, which goes through one pass."""
        return max(example.num_tokens for example in self.train)

    def largest_pass(self, trials: int) -> int:
        """Estimate the tokens that all trials' steps have together in a thousand steps' largest."""
        deviation = statistics.pstdev(example.num_tokens for example in self.train)
        return math.ceil(trials * self.step_tokens + 3 * deviation * math.sqrt(trials * self._batch_size))

    def of_pass(self, tokens: int) -> float:
        """Count the memory of a training pass of so many stream tokens, beside base and adapters.

        Layers keep what their backward reads: the inputs and outputs of norms; queries, keys, values and
        attention's output, on a CPU with every head's keys and values besides, for prefixes of about a row's
        length; gate, up and their product, and the activated gate unless that is fused; of adapters, what A
        gives, and on a CPU the masks of their dropout, a byte each. Beside it stand one layer's gradients.
        """
        size, answers = self.size, self._scored(tokens)
        kept = self._kept_numbers()
        beside = kept / size.num_layers
        if self.recomputes:  # layers keep their inputs, and one of them what all would keep
            kept = size.norm_width / 2 + beside
        elif self._is_on_gpu and tokens <= launch_bound_tokens(size.linear / len(size.layers)):
            tokens, answers = rounded_up(tokens, answers)
        return tokens * (kept + beside) * self._width + answers * size.vocabulary * _LOGIT_BYTES

    def of_texts(self, texts: TextsMemory | None, trials: int, activations: int) -> int:
        """Count the memory of trials' texts; recorded passes keep theirs meanwhile."""
        free = self.free - self.base - trials * self.adapter - activations
        return texts.count(self.device.kind, self._width, trials, max(0, free)) if texts else 0

    def _kept_numbers(self) -> float:
        """Return how many numbers all layers keep of a token."""
        size, settings = self.size, self._settings_by_rank(max)
        inputs = [size.adapted_inputs(one) for one in settings]
        low_width = max(padded_rank(one.lora_r) * len(own) for one, own in zip(settings, inputs, strict=True))
        has_masks = not self._is_on_gpu and max(self.space.values("lora_dropout")) > 0
        return (
            2 * size.norm_width
            + (1 if self._is_on_gpu else 3) * size.attention_width
            + (3 if self.device.fuses_mlp else 4) * size.mlp_width
            + low_width
            + (max(map(sum, inputs)) / self._width if has_masks else 0)
        )

    def _scored(self, tokens: int) -> int:
        """Estimate the answers' tokens in so many stream tokens, in a thousand passes' fullest."""
        counts = [example.num_scored for example in self.train]
        examples = tokens / self.step_tokens * min(self._batch_size, len(self.train))
        fullest = examples * statistics.fmean(counts) + 3 * math.sqrt(examples) * statistics.pstdev(counts)
        return min(math.ceil(fullest), tokens)

    @property
    def _is_on_gpu(self) -> bool:
        return self.device.kind == "cuda"

    @property
    def _width(self) -> int:
        """Return the bytes of a number in the model's dtype."""
        dtype = self.space.base_model.dtype
        return 2 if dtype == "bfloat16" or (dtype == "auto" and self.device.has_bfloat16) else 4

    @property
    def _bytes_of_parameter(self) -> int:
        return ADAPTER_BYTES + (self._width if self._width < 4 else 0)

    @property
    def _batch_size(self) -> int:
        """Return the largest batch that a trial may have."""
        return int(max(self.space.values("batch_size")))

    def _drawn_adapters(self, count: int) -> list[int]:
        """Return how many weights the adapters of so many trials may have, which are drawn."""
        keys, search = ("lora_r", "target_modules"), self.space.search
        drawn = [
            drawn_values(search, key, count, seed) if key in search else self.space.values(key) * count
            for seed, key in enumerate(keys)
        ]
        settings = (dict(zip(keys, values, strict=True)) for values in zip(*drawn, strict=True))
        return [self.size.adapter_parameters(self.space.trial_settings(one)) for one in settings]

    def _settings_by_rank(self, of_ranks: Callable[[list[Any]], float]) -> list[TrialSettings]:
        """Return settings with one rank of those that are searched, and every choice of target modules."""
        rank = int(of_ranks(self.space.values("lora_r")))
        return [
            self.space.trial_settings({"lora_r": rank, "target_modules": targets})
            for targets in self.space.values("target_modules")
        ]


def gib(count: float) -> str:
    """Write bytes in GiB."""
    return f"{count / 2**30:.1f} GiB"
