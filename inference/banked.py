"""Owns texts of a base in training: a bank's adapters generate on the weights that are there.

No second copy of the base is made, and no adapter is merged: every token goes through the adapter beside the
base. Attention is lent to the search, and given back to training.

Refuses to know what texts are for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from inference.engine import BeamEngine, Engine, make_engine
from qlora.config import DecodingSettings
from qlora.lora.bank import Adapter, AdapterBank


class TextsStoppedError(RuntimeError):
    """Texts that are not written to their end, since nobody waits for them."""


@dataclass
class BankedGenerator:
    """Generation with the adapters of a bank."""

    bank: AdapterBank
    tokenizer: Any
    decoding: DecodingSettings
    _engines: dict[tuple[int, ...], tuple[Engine, Any]] = field(default_factory=dict)

    def texts(
        self,
        adapter: Adapter | None,
        prompts: Sequence[Sequence[int]],
        end_tokens: Sequence[int] = (),
        is_over: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        """Generate a text for each prompt (token ids) under an adapter (None: the bare base).

        `end_tokens` end texts beside the tokenizer's EOS. What the search keeps on the device is given back.
        Raises TextsStoppedError once `is_over`, which is asked after each text, says so.
        """
        ends, found = tuple(end_tokens), dict[int, str]()
        with self.bank.serving(adapter), _lent(self.bank.model):
            settings = self.bank.model.generation_config
            if ends not in self._engines:
                engine = make_engine(
                    self.bank.model, self.tokenizer, self.decoding, "eager", ends, is_lent=True
                )
                self._engines[ends] = (engine, settings.eos_token_id)
            engine, settings.eos_token_id = self._engines[ends]
            try:
                for index, text, _ in engine.generate(prompts):
                    found[index] = text
                    if is_over():
                        raise TextsStoppedError(f"after {len(found)} of {len(prompts)} texts")
            finally:
                if isinstance(engine, BeamEngine):
                    engine.searcher.release()
        return [found[index] for index in range(len(prompts))]


@contextmanager
def _lent(model: Any) -> Iterator[None]:
    """Let engines set a model's attention and end tokens, within."""
    attention, ends = model.config._attn_implementation, model.generation_config.eos_token_id
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.generation_config.eos_token_id = ends
