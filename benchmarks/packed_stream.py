"""One optimizer step on 16 examples of the report's prompt: padded rows through plain PEFT against the packed stream.

    python benchmarks/packed_stream.py [--data FILE] [--steps 2]

Both run in this process on the same NF4 base with the same adapter; after a warm-up step each, steps alternate and the
median counts. The first losses must agree, or nothing is printed.
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

from benchmarks.report import print_report, synchronize
from qlora.adapters import attach_adapter
from qlora.attention import use_packed_attention
from qlora.base_model import default_token_budget, load_base, load_tokenizer
from qlora.config import DEFAULT_BASE, BaseModelSettings, TrialSettings
from qlora.data import load_examples
from qlora.packing import pack
from qlora.prompts import EncodedExample, encode_examples, load_prompt
from qlora.training import Training


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", default=DEFAULT_BASE)
    parser.add_argument("--data", default="data/sample/train.json")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--lora-dropout", type=float, default=0.1)
    arguments = parser.parse_args()
    rows = load_examples(arguments.data, need_output=True)[:16]
    examples = encode_examples(load_tokenizer(arguments.base_model), load_prompt(), rows, arguments.data)
    model = load_base(BaseModelSettings(name=arguments.base_model))
    own_attention = model.config._attn_implementation
    settings = TrialSettings(lora_r=arguments.lora_r, lora_dropout=arguments.lora_dropout, learning_rate=1e-6, schedule="constant")
    training = Training(attach_adapter(model, settings, arguments.base_model), examples, settings, default_token_budget())
    optimizer = torch.optim.AdamW(training.parameters.values(), lr=1e-6)

    def packed() -> float:
        use_packed_attention(model)
        training.step = 0
        return training.advance().loss

    def padded() -> float:
        model.set_attn_implementation(own_attention)
        return padded_step(training.model, examples, optimizer)

    first = {step.__name__: step() for step in (padded, packed)}
    assert arguments.lora_dropout or abs(first["packed"] - first["padded"]) < 1e-3 * first["padded"], first
    seconds = {step.__name__: [timed(step) for _ in range(arguments.steps)] for step in (padded, packed)}
    width = max(example.num_tokens for example in examples)
    print_report("packed_stream", statistics.median(seconds["packed"]), statistics.median(seconds["padded"]), "seconds a step",
                 {**vars(arguments), "threads": torch.get_num_threads(), "padded_tokens": width * len(examples),
                  "packed_tokens": pack(examples).num_tokens, "losses": first, "seconds": seconds}, higher_is_better=False)


def padded_step(model: Any, examples: list[EncodedExample], optimizer: torch.optim.Optimizer) -> float:
    """What users run today: right-padded rows, logits everywhere, labels of -100 on what is not answer."""
    model.train()
    ids, mask, labels = (tensor.to(model.device) for tensor in padded_rows(examples))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def padded_rows(examples: list[EncodedExample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, attention mask, labels), each [examples, longest]."""
    width = max(example.num_tokens for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        n = example.num_tokens
        ids[row, :n], mask[row, :n] = torch.tensor(example.prompt + example.answer), 1
        labels[row, len(example.prompt):n] = torch.tensor(example.answer)
    return ids, mask, labels


def timed(step: Callable[[], Any]) -> float:
    """Seconds that one call takes, the GPU's work included."""
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
