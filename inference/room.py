"""Owns how much a search does at once: what limits allow, and what memory has room for.

Refuses to know what is searched.
"""

from dataclasses import dataclass
from typing import Any

from inference.beam_search import SearchRules
from inference.kv_cache import CacheShape
from qlora.base.device import free_bytes, unreserved_bytes

# Rows, slots times beams, of which a GPU's step takes as long as one of fewer.
FEWEST_ROWS = {"cpu": 1, "cuda": 64}
_LIVE_WIDTHS = 8  # what a pass holds of a token at once, in hidden states; beside it an MLP's halves
_LOGIT_BYTES = 16  # the model's, in float32, and room to work
_USABLE = 0.8  # of free memory
_PREFILL_SHARE, _FEWEST_PREFILL_TOKENS = 0.1, 1024  # of free memory


@dataclass(frozen=True)
class Limits:
    """How much is done at once.

    max_slots: prompts that are searched together, at most. shrink_at: share of free slots at which the batch
    is made smaller; a GPU then has to record its step again. prefill_tokens: of a pass. is_lent: whether the
    process goes on with other work, whose memory is not to be had.
    """

    max_slots: int
    shrink_at: float
    prefill_tokens: int
    is_lent: bool = False


LIMITS = {"cpu": Limits(32, 0.25, 1024), "cuda": Limits(256, 0.5, 16384)}
# Of texts that are written in between and at once, by a base that has room to train.
LENT_LIMITS = {"cpu": LIMITS["cpu"], "cuda": Limits(2048, 0.75, 32768, is_lent=True)}


@dataclass(frozen=True)
class TextsMemory:
    """Counts what texts take that are written in between by a base that trains (LENT_LIMITS).

    num_texts: of an adapter. longest: tokens of the longest prompt. cache_width: numbers of a token's keys
    and values. pass_width: numbers that a prefill holds of a token, see `pass_width`.
    """

    num_texts: int
    longest: int
    max_new_tokens: int
    vocabulary: int
    cache_width: int
    pass_width: int

    def count(self, kind: str, number_bytes: int, num_adapters: int, free: int) -> int:
        """Return the bytes that the texts of so many adapters take at once.

        `kind`: of the device, with `free` bytes left beside training. `number_bytes`: of the model's dtype.
        """
        limits = LENT_LIMITS[kind]
        tokens = rounded_own(self.longest) + self.max_new_tokens
        cache = tokens * self.cache_width * number_bytes
        logits = _LOGIT_BYTES * self.vocabulary
        fitting = max(1, int(_USABLE * free) // (cache + logits))
        slots = min(limits.max_slots, fitting, num_adapters * self.num_texts)
        copy = int((1 - limits.shrink_at) * slots) * cache  # of those that are left, as the batch shrinks
        prefill = min(limits.prefill_tokens, slots * self.longest) * self.pass_width * number_bytes
        return slots * (cache + logits) + max(copy, prefill)


def pass_width(hidden: int, mlp: int) -> int:
    """Return the numbers that a pass holds of a token at once."""
    return _LIVE_WIDTHS * hidden + 3 * mlp


def rounded_own(num_tokens: int) -> int:
    """Return the prompt tokens that a slot has room for, so that slots fit the next prompts, too."""
    return -(-max(1, num_tokens) // 64) * 64


class Room:
    """The slots and tokens that there is room for, by the memory that was free at the last look.

    They are fewer once memory was short.
    """

    def __init__(self, model: Any, rules: SearchRules, shape: CacheShape, limits: Limits):
        self._model, self._rules, self._shape, self.limits = model, rules, shape, limits
        self.max_slots = self._asked = limits.max_slots
        self.look()

    def look(self) -> None:
        """See how much memory is free."""
        device = self._model.device
        self._free_bytes = unreserved_bytes(device) if self.limits.is_lent else free_bytes(device)

    def num_slots(self, num_examples: int, max_own: int, kept_bytes: int = 0) -> int:
        """Return how many slots there are: as many as memory holds and examples need, at most `max_slots`.

        They are so many that the last wave of examples fills them as the first does. `max_own`: tokens of a
        prompt that a slot has room for. `kept_bytes`: of a cache that the new one takes the place of.
        """
        vocabulary = self._model.config.get_text_config().vocab_size
        cached_tokens = max_own + self._rules.max_new_tokens * self._rules.num_beams
        cache_bytes = self._shape.bytes_per_token * cached_tokens
        logits_bytes = _LOGIT_BYTES * vocabulary * self._rules.num_beams
        usable_bytes = int(_USABLE * (self._free_bytes + kept_bytes))
        fitting = max(1, usable_bytes // (cache_bytes + logits_bytes))
        most = min(self.max_slots, fitting, num_examples)
        waves = -(-num_examples // most)
        self._asked = -(-num_examples // waves)
        return self._asked

    def halve(self) -> bool:
        """Have half of the slots that were last asked for, from here on; says no if that was one."""
        self.look()
        if self._asked == 1:
            return False
        self.max_slots = -(-self._asked // 2)
        return True

    def restore(self) -> None:
        """Have as many slots again as limits allow."""
        self.max_slots = self.limits.max_slots

    def prefill_tokens(self) -> int:
        """Return the tokens of a prefill: what memory has room for beside the slots, at most the limit."""
        config = self._model.config.get_text_config()
        width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        token_bytes = pass_width(config.hidden_size, width) * self._shape.dtype.itemsize
        room = int(_PREFILL_SHARE * self._free_bytes / token_bytes)
        return max(_FEWEST_PREFILL_TOKENS, min(self.limits.prefill_tokens, room))
