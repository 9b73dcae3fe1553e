"""Training throughput of trials that share a base, against PEFT on padded rows, one trial after another.

    python benchmarks/coresident.py [--base-model BASE | --shape 7b --tokenizer FOLDER] [--data FILE] \\
        [--trials 1 4] [--steps 2] [--within GIB] [--peer unsloth]

Both take batches of 16 examples; tokens are the examples' own, without padding. The baseline is PEFT on an
NF4 base as users run it at its best: no checkpointing, no upcast, bfloat16 autocast on a GPU, and of the
numbers of rows a pass that memory holds the fastest. Trials run one after another take as many times as long,
so its tokens/s stand for any number of trials. Where not one row fits, it is null. Ours has NF4 values
dequantised if memory allows; for --shape random bfloat16 weights stand for those. unsloth runs before both,
in a process of its own, on the same examples.
"""

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.models import (
    add_model_options,
    base_folder,
    fold,
    less_memory,
    load_for_work,
    load_nf4,
    load_words,
)
from benchmarks.padded import measure_padded, measure_steps
from benchmarks.peers import ask
from benchmarks.report import print_report
from qlora.base.device import default_token_budget
from qlora.base.fused import fuse
from qlora.config import TrialSettings
from qlora.data.examples import load_examples
from qlora.data.prompts import EncodedExample, encode_examples, load_prompt
from qlora.lora.bank import AdapterBank
from qlora.packed.attention import use_packed_attention
from qlora.training import StepResult, Training, advance_together
from tuning.plan import GPU_PASS_TOKENS


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
    parser.add_argument(
        "--budget",
        type=int,
        default=GPU_PASS_TOKENS if torch.cuda.is_available() else default_token_budget(),
        help="tokens of a pass, by default what a sweep's plan takes where memory is not short",
    )
    parser.add_argument("--recompute", action="store_true", help="layers are computed again in the backward")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--peer", choices=["unsloth"])
    arguments = parser.parse_args()
    settings = TrialSettings(
        lora_r=arguments.lora_r, lora_dropout=arguments.lora_dropout, schedule="constant"
    )
    tokenizer = load_words(arguments)
    rows = load_examples(arguments.data, need_output=True)[:1024]
    examples = encode_examples(tokenizer, load_prompt(), rows, arguments.data)
    if arguments.shape:
        examples = [EncodedExample(one.id, fold(one.prompt), fold(one.answer)) for one in examples]
    with less_memory(arguments.within):
        peer = measure_unsloth(arguments, examples, settings) if arguments.peer else None
        baseline = None if arguments.no_baseline else measure_baseline(arguments, examples, settings)
        found = measure_ours(arguments, examples, settings)
    best = max(entry["tokens_per_second"] for entry in found.values())
    extra: dict[str, Any] = {"trials_found": found, "peft": baseline}
    if peer is not None:
        extra |= {"unsloth": peer, "ratio_to_unsloth": round(best / peer["tokens_per_second"], 2)}
    print_report(
        "coresident",
        best,
        None if baseline is None else baseline["tokens_per_second"],
        "effective tokens/s",
        {**vars(arguments), **extra},
        higher_is_better=True,
    )


def measure_unsloth(
    arguments: argparse.Namespace, examples: list[EncodedExample], settings: TrialSettings
) -> dict[str, Any] | None:
    """Have unsloth train on the examples; None if it is not installed, or fails."""
    work = {
        "examples": [(one.prompt, one.answer) for one in examples],
        "lora_r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "learning_rate": settings.learning_rate,
        "steps": max(8, arguments.steps),
    }
    try:
        with base_folder(arguments) as folder:
            found = ask("unsloth", {**work, "folder": folder})
            tell("unsloth", found)
            return found
    except torch.cuda.OutOfMemoryError:
        print("unsloth: there is no memory to write the base that it would load", file=sys.stderr, flush=True)
        return None


def tell(name: str, found: dict[str, Any] | None) -> None:
    """Say on stderr what was measured, as soon as it is: the last line comes when all is."""
    if found is not None:
        print(f"{name}: {found['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True)


def measure_baseline(
    arguments: argparse.Namespace, examples: list[EncodedExample], settings: TrialSettings
) -> dict[str, Any] | None:
    """Measure PEFT on the base in NF4; None if not even one row fits."""
    try:
        found = measure_peft(load_nf4(arguments), examples, settings, arguments.steps)
        tell("PEFT", found)
        return found
    except torch.cuda.OutOfMemoryError:
        print("PEFT: out of memory with one row", file=sys.stderr, flush=True)
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


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
    return measure_padded(get_peft_model(model, config), examples, settings.learning_rate, steps)


def measure_ours(
    arguments: argparse.Namespace, examples: list[EncodedExample], settings: TrialSettings
) -> dict[str, dict[str, float]]:
    """Measure each number of trials together on a base as trials get it."""
    model = load_for_work(arguments)
    use_packed_attention(model)
    if model.device.type == "cuda":
        fuse(model)
    bank = AdapterBank(model, arguments.base_model)
    if arguments.recompute and not bank.recompute():
        raise SystemExit("this base's layers can't be computed again")
    found = {}
    for count in arguments.trials:
        found[str(count)] = measure_bank(bank, examples, settings, count, arguments)
        tell(f"ours, {count} together", found[str(count)])
    return found


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
        found = measure_steps([step], arguments.warm_up, arguments.steps)
        return {**found, "recordings": bank.recorder.num_recordings if bank.recorder else 0}
    finally:
        for training in trainings:
            bank.detach(training.adapter)


if __name__ == "__main__":
    main()
