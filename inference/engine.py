"""Owns the engine: from prompts' token ids to texts, behind one small interface.

`BeamEngine` is this project's search. `TransformersEngine` is `transformers.generate`, batched with left
padding. That is the reference that the search must equal, and the way out for settings and models that the
search does not cover.

Refuses to know files and Ray.

Source: https://huggingface.co/docs/transformers/main_classes/text_generation
"""

import logging
import secrets
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.generation import (
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inference.batch import Ways
from inference.beam_engine import BeamSearcher
from inference.beam_search import SearchRules
from inference.cached_attention import DecodePass
from inference.room import LENT_LIMITS
from qlora.base.model import load_tokenizer
from qlora.config import BaseModelSettings, DecodingSettings
from qlora.packed.agreement import check_agreement, eager_attention, random_tokens
from qlora.served import describe_weights, load_merged, quicken

_log = logging.getLogger(__name__)
_GENERATE_ROWS = {"cpu": 8, "cuda": 64}


class Engine(Protocol):
    """An object that generates texts for prompts."""

    @property
    def name(self) -> str:
        """Return how texts are generated, in words."""

    def generate(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, str, int]]:
        """Yield (index, text, number of new tokens) of each prompt, as they are done.

        A prompt is token ids, which start with BOS if the tokenizer has one. A text is the new tokens,
        decoded without special tokens and stripped.
        """


@dataclass(frozen=True)
class ServedModel:
    """The model that an engine loads: a base and, if any, the PEFT folder of its adapter."""

    base: BaseModelSettings
    adapter: str | None = None


@dataclass(frozen=True)
class BeamEngine:
    """Generation by this project's search."""

    searcher: BeamSearcher
    tokenizer: Any
    name: str

    def generate(
        self, prompts: Sequence[Sequence[int]], ways: Ways | None = None
    ) -> Generator[tuple[int, str, int]]:
        """Generate as Engine says; `ways`: where prompts are of several adapters."""
        with closing(self.searcher.search(prompts, ways)) as found:
            for index, tokens in found:
                yield index, self.tokenizer.decode(tokens, skip_special_tokens=True).strip(), len(tokens)


@dataclass(frozen=True)
class TransformersEngine:
    """Generation by `transformers.generate`; options that are not in `decoding` follow its defaults.

    batch_rows: prompts of one batch. attention: the model's own attention, which a search on the same model
    may have replaced; None leaves it as it is.
    """

    model: Any
    tokenizer: Any
    decoding: DecodingSettings
    batch_rows: int
    name: str = "transformers.generate"
    attention: str | None = None

    def generate(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, str, int]]:
        """Generate as Engine says; a batch runs until its longest output ends."""
        if self.attention is not None and self.model.config._attn_implementation != self.attention:
            self.model.set_attn_implementation(self.attention)
        for indices in self._batches(prompts):
            outputs = self._generate([prompts[index] for index in indices])
            for index, (text, num_tokens) in zip(indices, outputs, strict=True):
                yield index, text, num_tokens

    def _batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yield the indices of each batch's prompts, the longest first.

        A repetition penalty takes the tokens that pad a prompt for its own, so that no prompt is padded then.
        """
        order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
        is_one_length = self.decoding.repetition_penalty is not None
        for _, alike in groupby(order, lambda index: len(prompts[index]) if is_one_length else 0):
            while batch := list(islice(alike, self.batch_rows)):
                yield batch

    @torch.inference_mode()
    def _generate(self, prompts: list[Sequence[int]]) -> list[tuple[str, int]]:
        """Generate for one batch, padded on the left; return text and number of new tokens of each prompt."""
        width = max(len(prompt) for prompt in prompts)
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = self.tokenizer.eos_token_id
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self.model.device
        seed = self.decoding.seed
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
        ends = _as_tuple(self.model.generation_config.eos_token_id)
        counts = [_tokens_until(tokens, ends) for tokens in new.tolist()]
        texts = [_without_stop(text, self.decoding.stop or ()).strip() for text in texts]
        return list(zip(texts, counts, strict=True))


def load_engine(served: ServedModel, decoding: DecodingSettings, end_tokens: Sequence[int] = ()) -> Engine:
    """Load an engine with its model on this process's device.

    It is the search where that equals `transformers.generate`, else `transformers.generate`. `end_tokens` end
    outputs, too. Raises InputError if base or adapter can't be loaded.
    """
    model = load_merged(served.base, served.adapter)
    return make_engine(model, load_tokenizer(served.base.name), decoding, end_tokens=end_tokens)


def make_engine(
    model: Any,
    tokenizer: Any,
    decoding: DecodingSettings,
    attention: str | None = None,
    end_tokens: Sequence[int] = (),
    *,
    is_lent: bool = False,
) -> Engine:
    """Make the engine for a loaded model.

    It is the search, which replaces modules of the model by faster ones, unless its settings or the model
    need `transformers.generate`; then the engine's name says why. Outputs end at the tokenizer's EOS, with
    which answers end in training, as well as where the model's generation config says, and at `end_tokens`.
    `attention` is the model's own, if other engines work with the same model. One that is lent keeps its
    modules: it goes on training. Then more prompts are searched together, as memory allows.
    """
    known = _as_tuple(model.generation_config.eos_token_id)
    model.generation_config.eos_token_id = list(dict.fromkeys([*known, tokenizer.eos_token_id, *end_tokens]))
    attention = attention or model.config._attn_implementation
    try:
        rules = search_rules(model, decoding)
        _try_out(model, rules)
    except torch.cuda.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _log.warning("using transformers.generate: %s", reason)
        return TransformersEngine(
            model=model,
            tokenizer=tokenizer,
            decoding=decoding,
            batch_rows=_GENERATE_ROWS[model.device.type],
            name=f"transformers.generate ({reason})",
            attention=attention,
        )
    name = f"beam engine, {describe_weights(model)}"
    if not is_lent:
        quicken(model)
    limits = LENT_LIMITS[model.device.type] if is_lent else None
    searcher = BeamSearcher(model, rules, decoding.seed, limits=limits)
    return BeamEngine(searcher=searcher, tokenizer=tokenizer, name=name)


def _without_stop(text: str, stop: Sequence[str]) -> str:
    """Return what stands before the first of the texts that end an output."""
    return text[: min((text.find(one) for one in stop if one in text), default=len(text))]


def _tokens_until(tokens: list[int], ends: tuple[int, ...]) -> int:
    """Count the tokens up to the first that ends an output, that one included."""
    for place, token in enumerate(tokens):
        if token in ends:
            return place + 1
    return len(tokens)


def _as_tuple(tokens: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return the EOS tokens of a generation config, which may be one, several or none."""
    if tokens is None:
        return ()
    return (tokens,) if isinstance(tokens, int) else tuple(tokens)


def _try_out(model: Any, rules: SearchRules) -> None:
    """Search with two short prompts, through prefix, prefill and two decode steps.

    Raises ValueError if the logits of the prefill or of the last step are not those of the model's own
    attention: a family may use attention in a way that the search's cache can't serve. Others show it by an
    error of their own.
    """
    rules = replace(
        rules, max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=max(2, rules.num_beams)
    )
    vocabulary = model.config.get_text_config().vocab_size
    shared, *owns = (random_tokens(count, vocabulary, seed) for seed, count in enumerate((5, 4, 4)))
    prompts = [[*shared, *own] for own in owns]
    begun = list[Tensor]()  # of each prefill: the logits of its rows' last tokens [n, V]
    fed = list[tuple[Tensor, Tensor]]()  # of each decode step: beams' tokens so far [E, K, 3], logits [T, V]

    def keep(module: Any, given: Any, named: dict[str, Any], out: Any) -> None:
        # Copies, since the search overwrites what it gets; a recorded step makes them anew each time.
        logits = out.logits[0].clone()
        if isinstance(named["cached"], DecodePass):
            fed.append((named["cached"].state.tokens_EKT.clone(), logits))
        else:
            begun.append(logits)

    hook = model.register_forward_hook(keep, with_kwargs=True)
    try:
        dict(BeamSearcher(model, rules).search(prompts))
    finally:
        hook.remove()
    tokens_EKT, logits_TV = fed[-1]
    beams = tokens_EKT[:, :, :2].tolist()
    rows = [[*prompt, *one] for prompt, ones in zip(prompts, beams, strict=True) for one in ones]
    check_agreement(begun[-1], _own_logits(model, prompts), model.dtype)
    check_agreement(logits_TV, _own_logits(model, rows), model.dtype)


@torch.no_grad()
def _own_logits(model: Any, rows: list[list[int]]) -> Tensor:
    """Compute the logits behind rows of one length by the model's own attention, [rows, V]."""
    with eager_attention(model):
        ids = torch.tensor(rows, device=model.device)
        logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    return logits[:, 0]


def generate_options(decoding: DecodingSettings) -> dict[str, Any]:
    """Return the keywords of `transformers.generate` that `decoding` sets.

    It fills in the others from the model and its own defaults.
    """
    options = decoding.model_dump(exclude_none=True, exclude={"seed", "stop"})
    return {**options, "stop_strings": list(decoding.stop)} if decoding.stop else options


def search_rules(model: Any, decoding: DecodingSettings) -> SearchRules:
    """Return the rules by which `transformers.generate` would search with this model.

    Raises ValueError for settings that this project's search lacks.
    """
    config, _ = model._prepare_generation_config(None, **generate_options(decoding))
    mode = config.get_generation_mode().value
    if mode not in ("greedy_search", "sample", "beam_search"):
        raise ValueError(f"{mode.replace('_', ' ')} is not one of its ways")
    processors = model._get_logits_processor(config, input_ids_seq_length=1, device=model.device)
    warpers = []
    others = []
    for processor in processors:
        if isinstance(processor, (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)):
            warpers.append(processor)
        elif not isinstance(processor, MinNewTokensLengthLogitsProcessor):
            others.append(type(processor).__name__)
    if others or config.stop_strings or config.max_time:
        asked_for = ", ".join(others) or "stop texts or a time limit"
        raise ValueError(f"asked for: {asked_for}")
    return SearchRules(
        num_beams=config.num_beams,
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=config.min_new_tokens or 0,
        eos_tokens=_as_tuple(config.eos_token_id),
        length_penalty=config.length_penalty,
        early_stopping=config.early_stopping,
        do_sample=config.do_sample,
        warpers=tuple(warpers),
    )
