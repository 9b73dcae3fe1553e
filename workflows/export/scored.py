"""Owns an export's score: public perplexity by a plain loop, as any user of transformers would write it.

Nothing of this project's fast paths is used: one example at a time, transformers' own attention. So the
figure tells what the export does elsewhere.

Refuses to know formats.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from workflows.session import FailedError, go_on

if TYPE_CHECKING:
    from qlora.data.prompts import EncodedExample
    from workflows.export.work import Work

MOST_OFF = 0.01


@torch.no_grad()
def plain_perplexities(
    model: Any, examples: "Sequence[EncodedExample]", progress: Callable[[int, int], None]
) -> list[float]:
    """Measure exp(mean NLL of the scored tokens) of each example, in their order.

    `progress(done, total)` is called after each.
    """
    model.eval()
    device = next(model.parameters()).device
    values = []
    for example in examples:
        go_on()
        ids = torch.tensor([example.prompt + example.answer], device=device)
        start = len(example.prompt)
        places = torch.tensor(
            [start + place for place in (example.scored or range(len(example.answer)))], device=device
        )
        logits_TV = model(input_ids=ids, use_cache=False).logits[0]
        nll = cross_entropy(logits_TV[places - 1].float(), ids[0, places])
        values.append(math.exp(nll.item()) if nll.item() < 700 else math.inf)
        progress(len(values), len(examples))
    return values


def load_checked(auto_class: Any, source: Any, **options: Any) -> Any:
    """Load a model by `from_pretrained`, on this process's device. Raises FailedError if a weight is missing.

    transformers itself draws missing weights at random, and tells that in its log only.
    """
    from qlora.base.device import default_device

    model, found = auto_class.from_pretrained(
        source,
        device_map={"": default_device()},
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if found.get(kind):
            first = sorted(map(str, found[kind]))[0]
            raise FailedError(f"loaded back, the export has {len(found[kind])} {kind}, such as {first}")
    return model.requires_grad_(False).eval()


def ids_that_differ(work: "Work", tokenizer: Any) -> list[str]:
    """Return the ids of public examples whose tokens are others under an export's own tokenizer."""
    from qlora.data.prompts import encode_examples

    read = encode_examples(
        tokenizer, work.choice.prompt, work.public.examples, work.public.words, work.max_length
    )
    pairs = zip(read, work.encoded, strict=True)
    return [
        str(own.id)
        for own, champions in pairs
        if own.prompt + own.answer != champions.prompt + champions.answer
    ]


def check_within(export: float, champion: float, words: str) -> None:
    """Raise FailedError unless an export's perplexity is within 1 % of the champion's."""
    off = abs(export / champion - 1)
    if not off <= MOST_OFF:  # which is so for what is no number, too
        raise FailedError(
            f"loaded back, the export has public perplexity {export:.4f}, and the champion {champion:.4f}: "
            f"{off:.1%} off, more than {MOST_OFF:.0%}{words}; nothing is written"
        )
