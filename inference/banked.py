"""Owns texts of a base in training: a bank's adapters generate on the weights that are there.

No second copy of the base is made, and no adapter is merged: every token goes through the adapter beside the
base. Attention is lent to the search, and given back to training.

Refuses to know what texts are for.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from inference.batch import Piece, Way, Ways
from inference.engine import BeamEngine, Engine, make_engine
from qlora.config import DecodingSettings
from qlora.lora.bank import Adapter, AdapterBank


class TextsStoppedError(RuntimeError):
    """Texts that are not written to their end, since nobody waits for them."""


@dataclass(frozen=True)
class Asked:
    """Prompts (token ids) that an adapter (None: the bare base) writes texts for.

    end_tokens: what ends texts beside the tokenizer's EOS.
    """

    adapter: Adapter | None
    prompts: Sequence[Sequence[int]]
    end_tokens: Sequence[int] = ()


@dataclass
class BankedGenerator:
    """Generation with the adapters of a bank."""

    bank: AdapterBank
    tokenizer: Any
    decoding: DecodingSettings
    _engines: dict[tuple[int, ...], tuple[Engine, Any]] = field(default_factory=dict)

    def texts(
        self, requests: Sequence[Asked], is_over: Callable[[], bool] = lambda: False
    ) -> list[list[str]]:
        """Generate each request's texts, of all adapters together where the search can.

        What is taken of the device is given back. Raises TextsStoppedError once `is_over`, which is
        asked after each text, says so.
        """
        found: list[dict[int, str]] = [{} for _ in requests]
        by_ends: dict[tuple[int, ...], list[int]] = {}
        for place, request in enumerate(requests):
            by_ends.setdefault(tuple(request.end_tokens), []).append(place)
        for ends, places in by_ends.items():
            of_ends = [(place, requests[place]) for place in places]
            with _lent(self.bank.model), closing(self._written(ends, of_ends)) as written:
                for place, index, text in written:
                    found[place][index] = text
                    if is_over():
                        whole = sum(len(request.prompts) for request in requests)
                        raise TextsStoppedError(f"after {sum(map(len, found))} of {whole} texts")
        return [[texts[index] for index in range(len(texts))] for texts in found]

    def _written(
        self, ends: tuple[int, ...], requests: Sequence[tuple[int, Asked]]
    ) -> Generator[tuple[int, int, str]]:
        """Yield (place of the request, index of the prompt, text) of requests whose texts end alike."""
        settings = self.bank.model.generation_config
        if ends not in self._engines:
            with self.bank.serving(requests[0][1].adapter):
                engine = make_engine(
                    self.bank.model, self.tokenizer, self.decoding, "eager", ends, is_lent=True
                )
            self._engines[ends] = (engine, settings.eos_token_id)
        engine, settings.eos_token_id = self._engines[ends]
        if not isinstance(engine, BeamEngine):
            for place, request in requests:
                with self.bank.serving(request.adapter):
                    yield from ((place, index, text) for index, text, _ in engine.generate(request.prompts))
            return
        adapters = [request.adapter for _, request in requests]
        whose = [(part, index) for part, (_, one) in enumerate(requests) for index in range(len(one.prompts))]
        prompts = list(chain.from_iterable(request.prompts for _, request in requests))
        ways = Ways([part for part, _ in whose], partial(self._way_of, adapters))
        with closing(engine.generate(prompts, ways)) as texts:
            for number, text, _ in texts:
                part, index = whose[number]
                yield requests[part][0], index, text

    def _way_of(self, adapters: Sequence[Adapter | None], pieces: Sequence[Piece]) -> Way:
        """Return what leads passes of such pieces through their adapters."""
        bounds = [(start, end) for _, start, end in pieces]
        route = self.bank.route(bounds, [adapters[part] for part, _, _ in pieces], [None] * len(pieces))
        return partial(self.bank.switch.on_route, route)


@contextmanager
def _lent(model: Any) -> Iterator[None]:
    """Let engines set a model's attention and end tokens, within."""
    attention, ends = model.config._attn_implementation, model.generation_config.eos_token_id
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.generation_config.eos_token_id = ends
