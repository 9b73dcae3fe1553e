"""Independent ways to the same numbers: plain padded rows and a plain one-at-a-time loop, as users write
them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model

from qlora.config import TrialSettings
from qlora.data.prompts import EncodedExample


def padded_loss(model: Any, examples: Sequence[EncodedExample]) -> torch.Tensor:
    """Mean NLL over all answer tokens, from right-padded rows and labels."""
    width = max(e.num_tokens for e in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, e in enumerate(examples):
        ids[row, : e.num_tokens] = torch.tensor(e.prompt + e.answer)
        mask[row, : e.num_tokens] = 1
        labels[row, len(e.prompt) : e.num_tokens] = torch.tensor(e.answer)
    ids, mask, labels = (tensor.to(model.device) for tensor in (ids, mask, labels))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@torch.no_grad()
def loop_perplexities(model: Any, examples: Sequence[EncodedExample]) -> list[float]:
    """exp(mean NLL of the answer), one example at a time."""
    return [math.exp(padded_loss(model, [example]).item()) for example in examples]


def peft_adapter(model: Any, settings: TrialSettings) -> PeftModel:
    """A fresh adapter as PEFT itself makes it, drawn from the settings' seed."""
    targets = (
        settings.target_modules if isinstance(settings.target_modules, str) else list(settings.target_modules)
    )
    torch.manual_seed(settings.seed)
    return get_peft_model(
        model,
        LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        ),
    )
