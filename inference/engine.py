"""Owns the engine: token ids of prompts -> texts, behind one small interface.

`TransformersEngine` is `transformers.generate`, batched with left padding. Refuses to know files and Ray.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qlora.adapters import load_adapter
from qlora.base_model import load_base, load_tokenizer
from qlora.config import BaseModelSettings, DecodingSettings


class Engine(Protocol):
    """Whatever turns prompts into texts."""

    def generate(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """One text for each prompt (token ids that start with BOS if there is one), in their order: the new tokens decoded
        without special tokens, stripped."""


@dataclass(frozen=True)
class ServedModel:
    """What an engine loads: a base and, if any, the folder of its adapter."""

    base: BaseModelSettings
    adapter: str | None = None


@dataclass(frozen=True)
class TransformersEngine:
    """Generation by `transformers.generate`; options not in `decoding` follow its defaults."""

    model: Any
    tokenizer: Any
    decoding: DecodingSettings

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """See Engine. The whole batch runs until its longest output ends."""
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt):] = torch.tensor(prompt)
            mask[row, width - len(prompt):] = 1
        if self.decoding.seed is not None:
            torch.manual_seed(self.decoding.seed)
        options = self.decoding.model_dump(exclude_none=True, exclude={"seed"})
        device = self.model.device
        out = self.model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), pad_token_id=pad, **options)
        return [text.strip() for text in self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]


def load_engine(served: ServedModel, decoding: DecodingSettings) -> TransformersEngine:
    """An engine with its model on this process's device."""
    model: Any = load_base(served.base)
    if served.adapter is not None:
        model = load_adapter(model, served.adapter).eval()
    return TransformersEngine(model, load_tokenizer(served.base.name), decoding)
