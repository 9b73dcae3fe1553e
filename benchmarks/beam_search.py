"""Beam search over real prompts: transformers' generate at its best batch size against the beam engine.

    python benchmarks/beam_search.py [--shape 7b] [--data FILE] [--examples 16] [--num-beams 3] \\
        [--new-tokens 64 --forced] [--within GIB] [--peer vllm]

Same process, same model: a base with dequantised weights, or (`--shape`) random bfloat16 weights of that
size, whose token ids are the tokenizer's modulo the vocabulary. With `--forced` every output has exactly
`--new-tokens`, so that work is equal. Both are warm: the first, uncounted run compiles and records. The
baseline runs in transformers' own modules, ours in what is served. In float32 both must choose the same
tokens, or nothing is printed. `settings` has the rate of every batch size, and for `--profile` where the time
of the engine's step goes. Where memory holds no batch of the baseline, or with `--batches` and no number, the
baseline is null. vLLM runs before both, in a process of its own, on the same prompts; all its lengths are
forced, so that only with `--forced` work is equal. Where weights would not fit in the model's dtype, they
stay in NF4.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.models import add_model_options, base_folder, fold, less_memory, load_for_work, load_words
from benchmarks.packed_stream import timed
from benchmarks.peers import ask
from benchmarks.report import print_report
from inference.beam_engine import BeamSearcher
from inference.engine import TransformersEngine, search_rules
from qlora.config import DecodingSettings
from qlora.data.examples import load_examples
from qlora.data.prompts import load_prompt
from qlora.served import quicken

_FAMILIES = {
    "decode attention, without the template's": ("decode", "list_seen"),
    "prefill attention, and the template's": ("fmha", "flash", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass"),
    "top-k": ("TopK", "topk", "ort", "radix", "_look", "_choose"),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--data", default="data/sample/private_test.json")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--num-beams", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--forced", action="store_true")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 16])
    parser.add_argument(
        "--baseline-examples", type=int, help="as many for the baseline, whose rate hardly depends on it"
    )
    parser.add_argument("--max-slots", type=int)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--peer", choices=["vllm"])
    arguments = parser.parse_args()
    with less_memory(arguments.within):
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Measure the peer, the baseline and the engine one after another, and print."""
    tokenizer = load_words(arguments)
    rows = load_examples(arguments.data, need_output=False)[: arguments.examples]
    template = load_prompt()
    prompts = [template.ids(tokenizer, row.turns) for row in rows]
    if arguments.shape:
        prompts = [fold(prompt) for prompt in prompts]
    decoding = DecodingSettings(
        num_beams=arguments.num_beams,
        max_new_tokens=arguments.new_tokens,
        min_new_tokens=arguments.new_tokens if arguments.forced else None,
    )
    peer = ask_vllm(arguments, prompts) if arguments.peer else None
    model = load_for_work(arguments)
    some = prompts[: arguments.baseline_examples]
    rates, generate_gib, texts = measure_generate(model, tokenizer, decoding, some, arguments.batches)
    quicken(model)
    peak_memory_gib()
    searcher = BeamSearcher(model, search_rules(model, decoding), max_slots=arguments.max_slots)
    found: dict[int, list[int]] = {}
    if model.device.type == "cuda":
        print(
            f"first run: {timed(lambda: found.update(searcher.search(prompts))):.1f} s",
            file=sys.stderr,
            flush=True,
        )
    seconds = timed(lambda: found.update(searcher.search(prompts)))
    if model.dtype == torch.float32:
        ours = {
            index: str(tokenizer.decode(found[index], skip_special_tokens=True)).strip() for index in texts
        }
        assert ours == texts, [(ours[index], texts[index]) for index in texts if ours[index] != texts[index]]
    best = max(rates.values(), default=None)
    extra: dict[str, Any] = {
        "num_new_tokens": sum(map(len, found.values())),
        "generate_examples_per_second": rates,
        "threads": torch.get_num_threads(),
    }
    if peer is not None:
        ratio = len(prompts) / seconds / peer["examples_per_second"]
        extra |= {"vllm": peer, "ratio_to_vllm": round(ratio, 2)}
    if 1 in rates:
        extra["ratio_to_one_at_a_time"] = round(len(prompts) / seconds / rates[1], 2)
    if model.device.type == "cuda":
        extra["peak_memory_gib"] = {"ours": peak_memory_gib(), "generate": generate_gib}
    if arguments.profile:
        extra["profile_ms"] = profile(searcher, prompts)
    print_report(
        "beam_search",
        len(prompts) / seconds,
        best,
        "examples/s",
        {**vars(arguments), **extra},
        higher_is_better=True,
    )


def measure_generate(
    model: Any, tokenizer: Any, decoding: DecodingSettings, prompts: list[tuple[int, ...]], batches: list[int]
) -> tuple[dict[int, float], dict[int, float | None], dict[int, str]]:
    """Measure `generate` in batches of each size that memory holds.

    Returns examples/s and peak GiB by size, and the texts by prompt.
    """
    rates, gib, texts = dict[int, float](), dict[int, float | None](), dict[int, str]()
    for batch in batches:
        engine = TransformersEngine(model, tokenizer, decoding, batch)
        try:
            if model.device.type == "cuda":
                list(engine.generate(prompts[:batch]))
            started = time.perf_counter()
            texts.update((index, text) for index, text, _ in engine.generate(prompts))
            seconds = time.perf_counter() - started
        except torch.cuda.OutOfMemoryError:
            print(f"generate, batch {batch}: out of memory", file=sys.stderr, flush=True)
            continue
        rates[batch], gib[batch] = len(prompts) / seconds, peak_memory_gib()
        print(f"generate, batch {batch}: {rates[batch]:.3f} examples/s", file=sys.stderr, flush=True)
    return rates, gib, texts


def ask_vllm(arguments: argparse.Namespace, prompts: list[tuple[int, ...]]) -> dict[str, Any] | None:
    """Have vLLM search for the prompts' answers; None if it is not installed, or fails."""
    with base_folder(arguments, weights=False) as folder:
        work = {
            "folder": folder,
            "dummy": arguments.shape is not None,
            "prompts": prompts,
            "num_beams": arguments.num_beams,
            "new_tokens": arguments.new_tokens,
        }
        return ask("vllm", work)


def peak_memory_gib() -> float | None:
    """Return the most GPU memory allocated since the last call; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return round(peak / 2**30, 1)


def profile(searcher: BeamSearcher, prompts: list[tuple[int, ...]]) -> dict[str, float]:
    """Measure milliseconds of GPU work of a whole run by kernel family, and the wall time."""
    from torch.profiler import ProfilerActivity

    start = time.perf_counter()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as recorded:
        dict(searcher.search(prompts))
        torch.cuda.synchronize()
    spent = {"wall (with the profiler)": 1000 * (time.perf_counter() - start)}
    for event in recorded.key_averages():
        name = event.key
        family = next(
            (family for family, parts in _FAMILIES.items() if any(part in name for part in parts)),
            "elementwise and others",
        )
        spent[family] = spent.get(family, 0.0) + event.self_device_time_total / 1000
    for event in sorted(recorded.key_averages(), key=lambda one: -one.self_device_time_total)[:14]:
        print(
            f"{event.self_device_time_total / 1000:9.1f} ms {event.count:7d} {event.key[:100]}",
            file=sys.stderr,
        )
    return {family: round(milliseconds, 1) for family, milliseconds in spent.items()}


if __name__ == "__main__":
    main()
