"""Owns peers: other libraries that do a benchmark's work, on the same GPU, each in a process of its own.

    python benchmarks/peers.py unsloth|vllm < work.json

A benchmark asks before it has a model on the GPU, and goes on when the peer's process has ended: peers change
transformers on import, or take all memory there is. What such a process prints last is one JSON line.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def ask(peer: str, work: dict[str, Any]) -> dict[str, Any] | None:
    """Have a peer do the work, and return what it tells; None if it is not installed or fails.

    `work` for unsloth: folder of the base, examples (prompt and answer ids), lora_r, lora_alpha,
    lora_dropout, learning_rate, steps. For vllm: folder, dummy (whether weights are to be drawn there),
    prompts (ids), num_beams, new_tokens. Why there is nothing stands on a line of stderr.
    """
    if not _is_installed(peer):
        print(f"{peer} is not installed here", file=sys.stderr, flush=True)
        return None
    command = [sys.executable, __file__, peer]
    offline = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "VLLM_NO_USAGE_STATS": "1"}
    ended = subprocess.run(
        command, input=json.dumps(work), stdout=subprocess.PIPE, text=True, env={**os.environ, **offline}
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    if ended.returncode != 0 or not lines:
        print(f"{peer} failed with exit code {ended.returncode}", file=sys.stderr, flush=True)
        return None
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def train_unsloth(work: dict[str, Any]) -> dict[str, Any]:
    """Measure unsloth's training on padded rows at its best: as many rows a pass as are fastest.

    Layers are computed again in the backward only where not all rows fit without.
    """
    import unsloth  # isort: skip - it changes transformers, so it comes first
    import gc

    import torch

    from benchmarks.padded import measure_padded
    from qlora.data.prompts import EncodedExample

    examples = [
        EncodedExample(str(place), tuple(prompt), tuple(answer))
        for place, (prompt, answer) in enumerate(work["examples"])
    ]
    found: dict[str, Any] = {}
    for checkpointing in (False, "unsloth"):
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            work["folder"],
            max_seq_length=2048,
            load_in_4bit=True,
            dtype=torch.bfloat16,
            local_files_only=True,
        )
        adapted = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=work["lora_r"],
            lora_alpha=work["lora_alpha"],
            lora_dropout=work["lora_dropout"],
            target_modules=list(_LINEAR),
            use_gradient_checkpointing=checkpointing,
        )
        try:
            one = measure_padded(
                adapted, examples, work["learning_rate"], work["steps"], warm_up=10, with_labels=True
            )
        except torch.cuda.OutOfMemoryError:
            one = None
        del model, adapted
        gc.collect()
        torch.cuda.empty_cache()
        if one is not None and one["tokens_per_second"] > found.get("tokens_per_second", 0):
            found = {**one, "checkpointing": bool(checkpointing)}
        if one is not None and 16 in one["tokens_per_second_by_rows"]:
            break
    if not found:
        raise SystemExit("unsloth: out of memory with one row")
    return {**found, "version": unsloth.__version__}


def search_vllm(work: dict[str, Any]) -> dict[str, Any]:
    """Measure vLLM's generation with all lengths forced, its prefix cache empty: the fastest of five.

    It may have nine tenths of the memory that is free. Several beams are searched by vllm-beam-search-plugin
    where that is installed, else by vLLM itself.
    """
    import torch
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import BeamSearchParams

    has_plugin = _is_installed("vllm_beam_search")
    free, total = torch.cuda.mem_get_info()
    num_beams, new = work["num_beams"], work["new_tokens"]
    options: dict[str, Any] = {"max_cudagraph_capture_size": 768}
    if work["dummy"]:
        options["load_format"] = "dummy"
    if num_beams > 1 and has_plugin:
        options["scheduler_cls"] = "vllm_beam_search.scheduler.BeamSearchScheduler"
    llm = LLM(
        model=work["folder"],
        dtype="bfloat16",
        max_model_len=max(map(len, work["prompts"])) + new + 1,
        gpu_memory_utilization=0.9 * free / total,
        enable_prefix_caching=True,
        seed=0,
        **options,
    )
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]
    rules: dict[str, Any] = {"temperature": 0, "max_tokens": new, "ignore_eos": True, "detokenize": False}
    if num_beams > 1:
        # The plugin takes EOS for an end whatever is ignored, so that it is masked.
        rules |= {"min_tokens": new, "extra_args": {"beam_width": num_beams, "length_penalty": 1.0}}

    def run() -> Any:
        if num_beams > 1 and not has_plugin:
            return llm.beam_search(inputs, BeamSearchParams(num_beams, new, ignore_eos=True))
        return llm.generate(inputs, SamplingParams(**rules), use_tqdm=False)

    run()  # kernels are compiled
    seconds = math.inf
    for _ in range(5):
        llm.reset_prefix_cache()
        started = time.perf_counter()
        run()
        seconds = min(seconds, time.perf_counter() - started)
    searcher = "vllm" if num_beams == 1 or not has_plugin else "vllm-beam-search-plugin"
    return {
        "examples_per_second": round(len(inputs) / seconds, 2),
        "searcher": searcher,
        "version": vllm.__version__,
    }


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    peers = {"unsloth": train_unsloth, "vllm": search_vllm}
    print("\n" + json.dumps(peers[sys.argv[1]](json.load(sys.stdin))), flush=True)
