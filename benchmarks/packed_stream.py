"""One optimizer step on 16 examples: padded rows through plain PEFT against the packed stream.

    python benchmarks/packed_stream.py [--data FILE] [--prompt chat] [--steps 2]

Both run in this process, each on its own NF4 base: the baseline is PEFT as it is, ours is this project's
bank, with its NF4 values dequantised if memory allows. After a warm-up step each, steps alternate and the
median counts. Without dropout the first losses must agree, or nothing is printed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from benchmarks.report import print_report, synchronize
from qlora.base.device import default_token_budget
from qlora.base.model import load_base, load_tokenizer
from qlora.config import DEFAULT_BASE, BaseModelSettings, TrialSettings
from qlora.data.examples import load_examples
from qlora.data.prompts import EncodedExample, encode_examples, load_prompt
from qlora.lora.bank import load_bank
from qlora.packed.packing import pack
from qlora.training import Training


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-model", default=DEFAULT_BASE)
    parser.add_argument("--data", default="data/sample/train.json")
    parser.add_argument("--prompt", default="default")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--lora-dropout", type=float, default=0.1)
    arguments = parser.parse_args()
    rows = load_examples(arguments.data, need_output=True)[:16]
    prompt = load_prompt(arguments.prompt)
    examples = encode_examples(load_tokenizer(arguments.base_model), prompt, rows, arguments.data)
    settings = TrialSettings(
        lora_r=arguments.lora_r, lora_dropout=arguments.lora_dropout, learning_rate=1e-6, schedule="constant"
    )
    training = Training(load_bank(BaseModelSettings(name=arguments.base_model)), examples, settings)
    peft_model = make_peft_model(arguments.base_model, settings)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-6)

    def packed() -> float:
        training.step = 0
        return training.advance(default_token_budget()).loss

    def padded() -> float:
        return padded_step(peft_model, examples, optimizer)

    first = {step.__name__: step() for step in (padded, packed)}
    assert arguments.lora_dropout or abs(first["packed"] - first["padded"]) < 1e-3 * first["padded"], first
    seconds: dict[str, list[float]] = {"padded": [], "packed": []}
    for _ in range(arguments.steps):
        for step in (padded, packed):
            seconds[step.__name__].append(timed(step))
    width = max(example.num_tokens for example in examples)
    print_report(
        "packed_stream",
        statistics.median(seconds["packed"]),
        statistics.median(seconds["padded"]),
        "seconds a step",
        {
            **vars(arguments),
            "threads": torch.get_num_threads(),
            "padded_tokens": width * len(examples),
            "unshared_tokens": sum(example.num_tokens for example in examples),
            "packed_tokens": pack(examples).num_tokens,
            "losses": first,
            "seconds": seconds,
        },
        higher_is_better=False,
    )


def make_peft_model(base_model: str, settings: TrialSettings) -> Any:
    """Make the baseline: the same base and adapter as PEFT itself builds them."""
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=int(settings.lora_alpha),
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(load_base(BaseModelSettings(name=base_model)), config)


def padded_step(model: Any, examples: list[EncodedExample], optimizer: torch.optim.Optimizer) -> float:
    """Take one optimizer step on padded rows, as users do today. Returns the loss."""
    loss = padded_backward(model, examples)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def padded_backward(model: Any, examples: list[EncodedExample]) -> torch.Tensor:
    """Compute loss and gradients of right-padded rows.

    Logits are everywhere, labels are -100 on what is not an answer.
    """
    model.train()
    ids, mask, labels = (tensor.to(model.device) for tensor in padded_rows(examples))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    return loss.detach()


def padded_rows(examples: list[EncodedExample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (ids, attention mask, labels), each [examples, longest]."""
    width = max(example.num_tokens for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        n = example.num_tokens
        ids[row, :n], mask[row, :n] = torch.tensor(example.prompt + example.answer), 1
        scored = range(len(example.answer)) if example.scored is None else example.scored
        for place in scored:
            labels[row, len(example.prompt) + place] = example.answer[place]
    return ids, mask, labels


def timed(step: Callable[[], Any]) -> float:
    """Return the seconds that one call takes, the GPU's work included."""
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
