"""Owns the proof that a loaded model computes under this project's attention what it computes under its own.

A family's code may do with attention what no look at its config shows: call it twice a layer, hand no
keywords down, ask for a term that is not computed here. So every model is tried once, on a few random rows
behind a shared prefix, and its logits are compared with those of transformers' eager attention, row by row.

Refuses to know adapters and data.

Shapes: A scored positions, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qlora.config import InputError
from qlora.data.prompts import EncodedExample
from qlora.packed.attention import packed_logits, use_packed_attention
from qlora.packed.packing import pack

_PREFIX_TOKENS = 12
_PROMPT_TOKENS, _ANSWER_TOKENS = (3, 7, 1), (6, 4, 9)  # of each row, behind the prefix
# What rounding may do to the logits at half of the positions. A wrong one does more than that.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}


def pack_attention(model: Any, name: str) -> None:
    """Give a loaded model packed attention, after it has been tried.

    Raises InputError, naming the base, for a model whose results would not be its own, or no numbers.
    """
    try:
        use_packed_attention(model)
        _try_out(model)
    except ValueError as error:
        raise InputError(name, f"can't be worked with here: {error}") from error


def check_agreement(found_AV: Tensor, own_AV: Tensor, dtype: torch.dtype) -> None:
    """Compare logits with those of a model's own attention.

    Raises ValueError if they differ by more than the rounding of `dtype`, and if they are no finite numbers.
    """
    found_AV, own_AV = found_AV.float(), own_AV.float()
    if not own_AV.isfinite().all():
        raise ValueError("its logits are no finite numbers; its weights are no good, or not in this dtype")
    spread_A = (own_AV - own_AV.mean(-1, keepdim=True)).norm(dim=-1)
    difference = ((found_AV - own_AV).norm(dim=-1) / spread_A).median().item()
    if not difference <= _TOLERANCES[dtype]:  # a NaN, too
        raise ValueError(
            f"its logits differ by {difference:.2g} of their spread from those of its own attention"
        )


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Give a model transformers' eager attention, within."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def random_tokens(count: int, vocabulary: int, seed: int) -> tuple[int, ...]:
    """Draw token ids, on the CPU and the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(vocabulary, (count,), generator=generator).tolist())


@torch.no_grad()
def _try_out(model: Any) -> None:
    vocabulary = model.config.get_text_config().vocab_size
    prefix = random_tokens(_PREFIX_TOKENS, vocabulary, seed=0)
    examples = []
    for seed, (num_prompt, num_answer) in enumerate(zip(_PROMPT_TOKENS, _ANSWER_TOKENS, strict=True), 1):
        own = random_tokens(num_prompt + num_answer, vocabulary, seed)
        examples.append(EncodedExample(str(seed), prefix + own[:num_prompt], own[num_prompt:]))
    batch = pack(examples, model.device)
    found_AV = packed_logits(model, batch)
    with eager_attention(model):
        rows = [
            model(
                input_ids=torch.tensor([example.prompt + example.answer], device=model.device),
                use_cache=False,
            ).logits[0, len(example.prompt) - 1 : -1]
            for example in examples
        ]
    check_agreement(found_AV, torch.cat(rows), model.dtype)
