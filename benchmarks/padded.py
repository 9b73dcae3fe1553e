"""Owns the measure of training on padded rows, as PEFT's users do it, at its best number of rows a pass."""

import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.packed_stream import padded_backward, padded_rows
from benchmarks.report import synchronize
from qlora.data.prompts import EncodedExample

# On a CPU more rows do not fit a small machine.
_ROWS = (16, 8, 4, 2, 1) if torch.cuda.is_available() else (4, 2, 1)
_WARM_UP = 3 if torch.cuda.is_available() else 1  # kernels are compiled in the first steps


def measure_padded(
    adapted: Any,
    examples: list[EncodedExample],
    learning_rate: float,
    steps: int,
    *,
    warm_up: int = _WARM_UP,
    with_labels: bool = False,
) -> dict[str, Any]:
    """Measure effective tokens/s and peak memory of steps on 16 examples, as many rows a pass as is fastest.

    `with_labels`: the model computes the loss itself. Raises torch.cuda.OutOfMemoryError if not even one row
    fits.
    """
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=learning_rate)
    batches = [examples[start : start + 16] for start in range(0, len(examples) - 15, 16)]
    backward = labelled_backward if with_labels else padded_backward
    found, last = dict[int, dict[str, float]](), 0.0
    for rows in _ROWS:
        try:
            calls = [
                lambda batch=batch, rows=rows: _step(adapted, batch, rows, optimizer, backward)
                for batch in batches
            ]
            found[rows] = measure_steps(calls, warm_up, steps)
        except torch.cuda.OutOfMemoryError:
            if rows == 1 and not found:
                raise
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            continue
        if found[rows]["tokens_per_second"] < last:
            break  # fewer rows bring no more
        last = found[rows]["tokens_per_second"]
    best = max(found, key=lambda rows: found[rows]["tokens_per_second"])
    rates = {rows: one["tokens_per_second"] for rows, one in found.items()}
    return {**found[best], "rows_a_pass": best, "tokens_per_second_by_rows": rates}


def labelled_backward(model: Any, examples: list[EncodedExample]) -> torch.Tensor:
    """Compute loss and gradients of right-padded rows, with the loss that the model computes from labels."""
    model.train()
    ids, mask, labels = (tensor.to(model.device) for tensor in padded_rows(examples))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    return torch.as_tensor(loss.detach())


def _step(
    model: Any,
    batch: list[EncodedExample],
    rows: int,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[Any, list[EncodedExample]], torch.Tensor],
) -> int:
    """Take one optimizer step in passes of some rows; returns the batch's tokens."""
    for start in range(0, len(batch), rows):
        backward(model, batch[start : start + rows])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return sum(example.num_tokens for example in batch)


def measure_steps(steps: Sequence[Callable[[], int]], warm_up: int, count: int) -> dict[str, float]:
    """Run steps in turn, each returning its tokens, and measure tokens/s; the first ones are not counted."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    tokens, started = 0, 0.0
    for index in range(warm_up + count):
        if index == warm_up:
            synchronize()
            tokens, started = 0, time.perf_counter()
        tokens += steps[index % len(steps)]()
    synchronize()
    seconds = time.perf_counter() - started
    peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds_a_step": round(seconds / count, 4),
        "peak_gib": round(peak / 2**30, 1),
    }
