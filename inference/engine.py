"""Owns the engine: token ids of prompts -> texts, behind one small interface.

`BeamEngine` is this project's search. `TransformersEngine` is `transformers.generate`, batched with left padding: the
reference, and the way out for settings and families that the search does not cover. Refuses to know files and Ray.
"""

import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers.generation import (
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inference.beam_engine import BeamSearcher
from inference.beam_search import SearchRules
from qlora.base.model import load_tokenizer
from qlora.config import BaseModelSettings, DecodingSettings
from qlora.served import describe_weights, load_merged, quicken

_log = logging.getLogger(__name__)
_GENERATE_ROWS = {"cpu": 8, "cuda": 64}


class Engine(Protocol):
    """Whatever turns prompts into texts. `name`: how, in words."""

    @property
    def name(self) -> str:
        """How texts are made."""

    def generate(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, str, int]]:
        """(index, text, new tokens) of each prompt (token ids that start with BOS if there is one), as they are done: the new
        tokens decoded without special tokens, stripped, and their number."""


@dataclass(frozen=True)
class ServedModel:
    """What an engine loads: a base and, if any, the folder of its adapter."""

    base: BaseModelSettings
    adapter: str | None = None


@dataclass(frozen=True)
class BeamEngine:
    """Generation by this project's search."""

    searcher: BeamSearcher
    tokenizer: Any
    name: str

    def generate(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, str, int]]:
        """See Engine."""
        for index, tokens in self.searcher.search(prompts):
            yield index, self.tokenizer.decode(tokens, skip_special_tokens=True).strip(), len(tokens)


@dataclass(frozen=True)
class TransformersEngine:
    """Generation by `transformers.generate`; options not in `decoding` follow its defaults.

    attention: the model's own, which a search on the same model may have replaced; None leaves it as it is.
    """

    model: Any
    tokenizer: Any
    decoding: DecodingSettings
    batch_rows: int
    name: str = "transformers.generate"
    attention: str | None = None

    def generate(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, str, int]]:
        """See Engine. A batch runs until its longest output ends."""
        if self.attention is not None and self.model.config._attn_implementation != self.attention:
            self.model.set_attn_implementation(self.attention)
        order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
        for start in range(0, len(order), self.batch_rows):
            indices = order[start : start + self.batch_rows]
            outputs = self._generate([prompts[index] for index in indices])
            for index, (text, num_tokens) in zip(indices, outputs, strict=True):
                yield index, text, num_tokens

    @torch.inference_mode()
    def _generate(self, prompts: list[Sequence[int]]) -> list[tuple[str, int]]:
        width, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        if pad is None:
            pad = self.tokenizer.eos_token_id
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device, seed = self.model.device, self.decoding.seed
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(gpus):  # the process's own random state stays as it is
            torch.manual_seed(secrets.randbits(63) if seed is None else seed)
            out = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                pad_token_id=pad,
                tokenizer=self.tokenizer,
                **generate_options(self.decoding),
            )
        new = out[:, width:]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        counts = (new != pad).sum(1).tolist()
        return [(text.strip(), count) for text, count in zip(texts, counts, strict=True)]


def load_engine(served: ServedModel, decoding: DecodingSettings) -> Engine:
    """Load an engine with its model on this process's device: the search where it equals `generate`, else `generate`."""
    return make_engine(load_merged(served.base, served.adapter), load_tokenizer(served.base.name), decoding)


def make_engine(
    model: Any, tokenizer: Any, decoding: DecodingSettings, attention: str | None = None
) -> Engine:
    """Make the engine for a loaded model, which the search quickens; its name says why it is `generate`, if it is.

    Outputs end at the tokenizer's EOS, which answers end with in training, as well as where the model's generation
    config says. `attention`: the model's own, if other engines work with the same model.
    """
    ends = model.generation_config.eos_token_id
    known = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    model.generation_config.eos_token_id = list(dict.fromkeys([*known, tokenizer.eos_token_id]))
    attention = attention or model.config._attn_implementation
    try:
        rules = search_rules(model, decoding)
        _try_out(model, rules)
    except torch.cuda.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        _log.warning("using transformers.generate: %s", reason)
        rows, name = _GENERATE_ROWS[model.device.type], f"transformers.generate ({reason})"
        return TransformersEngine(model, tokenizer, decoding, rows, name, attention)
    weights = describe_weights(model)
    quicken(model)
    return BeamEngine(BeamSearcher(model, rules, decoding.seed), tokenizer, f"beam engine, {weights}")


def _try_out(model: Any, rules: SearchRules) -> None:
    """Two short prompts through template, prefill and two steps: some families show only here that their attention can't be served."""
    short = replace(rules, max_new_tokens=2, min_new_tokens=0)
    dict(BeamSearcher(model, short, seed=0).search([(0, 0, 1, 1), (0, 0, 0, 1)]))


def generate_options(decoding: DecodingSettings) -> dict[str, Any]:
    """`decoding` as keywords of `transformers.generate`, which fills in the rest from the model and its own defaults."""
    return decoding.model_dump(exclude_none=True, exclude={"seed"})


def search_rules(model: Any, decoding: DecodingSettings) -> SearchRules:
    """The rules by which `generate` would search with this model. Raises ValueError for settings that the search lacks."""
    config, _ = model._prepare_generation_config(None, **generate_options(decoding))
    mode = config.get_generation_mode().value
    if mode not in ("greedy_search", "sample", "beam_search"):
        raise ValueError(f"{mode.replace('_', ' ')} is not one of its ways")
    processors = model._get_logits_processor(config, input_ids_seq_length=1, device=model.device)
    warpers = tuple(
        one
        for one in processors
        if isinstance(one, (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper))
    )
    others = [
        type(one).__name__
        for one in processors
        if one not in warpers and not isinstance(one, MinNewTokensLengthLogitsProcessor)
    ]
    if others or config.stop_strings or config.max_time:
        raise ValueError(
            f"the model's generation config asks for {', '.join(others) or 'stop strings or a time limit'}"
        )
    eos = config.eos_token_id if config.eos_token_id is not None else ()
    return SearchRules(
        num_beams=config.num_beams,
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=config.min_new_tokens or 0,
        eos_tokens=(eos,) if isinstance(eos, int) else tuple(eos),
        length_penalty=config.length_penalty,
        early_stopping=config.early_stopping,
        do_sample=config.do_sample,
        warpers=warpers,
    )
