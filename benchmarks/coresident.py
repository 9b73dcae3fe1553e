"""Training throughput of trials that share a base, against PEFT on padded rows, one trial after another.

    python benchmarks/coresident.py [--base-model BASE | --shape 7b --tokenizer FOLDER] [--data FILE] \\
        [--trials 1 4] [--steps 2]

Both take batches of 16 examples; tokens are the examples' own, without padding. The baseline is PEFT on an
NF4 base as users run it at its best: no checkpointing, no upcast, bfloat16 autocast on a GPU, and of the
numbers of rows a pass that memory holds the fastest. Trials run one after another take as many times as long,
so its tokens/s stand for any number of trials. Ours has NF4 values dequantised if memory allows; for --shape
its random bfloat16 weights stand for those.
"""

import argparse
import gc
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.models import add_model_options, fold, load_model
from benchmarks.packed_stream import padded_backward
from benchmarks.report import print_report, synchronize
from qlora.base.device import default_token_budget
from qlora.base.fused import fuse
from qlora.base.model import dequantised_if_it_fits, load_base, load_tokenizer
from qlora.config import BaseModelSettings, TrialSettings
from qlora.data.examples import load_examples
from qlora.data.prompts import EncodedExample, encode_examples, load_prompt
from qlora.lora.bank import AdapterBank
from qlora.packed.attention import use_packed_attention
from qlora.training import StepResult, Training, advance_together

# On a CPU more rows do not fit a small machine.
_PEFT_ROWS = (16, 8, 4, 2, 1) if torch.cuda.is_available() else (4, 2, 1)
_PEFT_WARM_UP = 3 if torch.cuda.is_available() else 1  # kernels are compiled in the first steps


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--data", default="data/sample/train.json")
    parser.add_argument("--trials", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--lora-r", type=int, default=64)
    parser.add_argument("--lora-dropout", type=float, default=0.1)
    parser.add_argument(
        "--warm-up",
        type=int,
        default=40 if torch.cuda.is_available() else 1,
        help="steps before ours are timed: on a GPU passes are recorded as their sizes come up",
    )
    parser.add_argument("--budget", type=int, default=default_token_budget(), help="tokens of a pass")
    arguments = parser.parse_args()
    settings = TrialSettings(
        lora_r=arguments.lora_r, lora_dropout=arguments.lora_dropout, schedule="constant"
    )
    model, tokenizer = load_nf4(arguments)
    rows = load_examples(arguments.data, need_output=True)[:1024]
    examples = encode_examples(tokenizer, load_prompt(), rows, arguments.data)
    if arguments.shape:
        examples = [EncodedExample(one.id, fold(one.prompt), fold(one.answer)) for one in examples]
    baseline = measure_peft(model, examples, settings, arguments.steps)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    model = load_model(arguments)[0] if arguments.shape else dequantised_if_it_fits(load_nf4(arguments)[0])
    use_packed_attention(model)
    if model.device.type == "cuda":
        fuse(model)
    bank = AdapterBank(model, arguments.base_model)
    found = {
        str(count): measure_bank(bank, examples, settings, count, arguments) for count in arguments.trials
    }
    best = max(entry["tokens_per_second"] for entry in found.values())
    print_report(
        "coresident",
        best,
        baseline["tokens_per_second"],
        "effective tokens/s",
        {**vars(arguments), "trials_found": found, "peft": baseline},
        higher_is_better=True,
    )


def load_nf4(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Load (model, tokenizer) as the options say, its linear layers in NF4."""
    if not arguments.shape:
        return load_base(BaseModelSettings(name=arguments.base_model)), load_tokenizer(arguments.base_model)
    model, tokenizer = load_model(arguments)
    head = model.get_output_embeddings()
    for name in [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]:
        linear = model.get_submodule(name)
        quantised = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=model.dtype,
            quant_type="nf4",
            device="meta",
        )
        quantised.weight = Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        model.set_submodule(name, quantised.to(model.device))
    return model, tokenizer


def measure_peft(
    model: Any, examples: list[EncodedExample], settings: TrialSettings, steps: int
) -> dict[str, Any]:
    """Measure effective tokens/s and peak memory of plain PEFT on padded rows, as many a pass as is fastest.

    Raises torch.cuda.OutOfMemoryError if not even one row fits.
    """
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=int(settings.lora_alpha),
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.AdamW(
        [p for p in adapted.parameters() if p.requires_grad], lr=settings.learning_rate
    )
    batches = [examples[start : start + 16] for start in range(0, len(examples) - 15, 16)]
    found, last = dict[int, dict[str, float]](), 0.0
    for rows in _PEFT_ROWS:
        try:
            calls = [
                lambda batch=batch, rows=rows: peft_step(adapted, batch, rows, optimizer) for batch in batches
            ]
            found[rows] = _measured(calls, _PEFT_WARM_UP, steps)
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


def peft_step(model: Any, batch: list[EncodedExample], rows: int, optimizer: torch.optim.Optimizer) -> int:
    """Take one optimizer step in passes of some rows; returns the batch's tokens."""
    for start in range(0, len(batch), rows):
        padded_backward(model, batch[start : start + rows])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return sum(example.num_tokens for example in batch)


def measure_bank(
    bank: AdapterBank,
    examples: list[EncodedExample],
    settings: TrialSettings,
    count: int,
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """Measure effective tokens/s of `count` trials together, and peak memory."""
    trainings = [
        Training(bank, examples, settings.model_copy(update={"seed": seed, "epochs": 1000}))
        for seed in range(count)
    ]

    def step() -> int:
        results = [
            result
            for result in advance_together(trainings, arguments.budget)
            if isinstance(result, StepResult)
        ]
        assert len(results) == count, "a trial diverged"
        return sum(result.num_tokens for result in results)

    try:
        found = _measured([step], arguments.warm_up, arguments.steps)
        return {**found, "recordings": bank.recorder.num_recordings if bank.recorder else 0}
    finally:
        for training in trainings:
            bank.detach(training.adapter)


def _measured(steps: list[Any], warm_up: int, count: int) -> dict[str, float]:
    """Run steps in turn, each returning its tokens; the first ones are not counted."""
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


if __name__ == "__main__":
    main()
