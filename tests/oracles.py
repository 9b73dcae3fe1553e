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


def adamw_of(model: Any) -> torch.optim.Optimizer:
    """AdamW over what a model trains, as trials have it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)


def plain_step(
    model: Any, optimizer: torch.optim.Optimizer, batch: Sequence[EncodedExample], rate: float, clip: float
) -> float:
    """One step of plain PyTorch on padded rows; returns its loss."""
    loss = padded_loss(model, batch)
    loss.backward()
    group = optimizer.param_groups[0]
    torch.nn.utils.clip_grad_norm_(group["params"], clip)
    group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


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
