"""Public perplexity under the report's prompts: one example at a time against the packed stream.

    python benchmarks/perplexity.py [--data FILE] [--examples 16] [--shots 0 3] \\
        [--shape 7b --tokenizer FOLDER]

Same process, same NF4 values: the loop runs on the quantised base, as plain scripts do, ours on what
`evaluate.py` loads. The work is every example under each prompt (zero-shot and 3-shot, as in the report);
`settings` has the seconds and the ratio of each. Every value must agree to 1e-4 in float32, the mean to 1 %
in bfloat16, or nothing is printed.
"""

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from benchmarks.models import add_model_options, fold, load_model
from benchmarks.packed_stream import padded_rows, timed
from benchmarks.report import print_report
from qlora.base.device import default_token_budget
from qlora.base.model import load_base, load_tokenizer
from qlora.config import BaseModelSettings
from qlora.data.examples import load_examples
from qlora.data.prompts import EncodedExample, encode_examples, load_prompt
from qlora.packed.attention import use_packed_attention
from qlora.packed.packing import pack
from qlora.perplexity import example_perplexities, mean_perplexity
from qlora.served import load_served, quicken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--data", default="data/sample/public_test.json")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--shots-from", default="data/sample/train.json")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    rows = load_examples(arguments.data, need_output=True)[: arguments.examples]
    if arguments.shape:
        plain, tokenizer = load_model(arguments)
        served = copy.deepcopy(plain)
        quicken(served)
    else:
        base = BaseModelSettings(name=arguments.base_model)
        plain, served, tokenizer = load_base(base), load_served(base), load_tokenizer(arguments.base_model)
    use_packed_attention(served)
    prompts = {
        f"{shots}-shot": load_prompt("few-shot", shots, arguments.shots_from) if shots else load_prompt()
        for shots in arguments.shots
    }
    found = {}
    for name, prompt in prompts.items():
        examples = encode_examples(tokenizer, prompt, rows, arguments.data)
        if arguments.shape:
            examples = [EncodedExample(one.id, fold(one.prompt), fold(one.answer)) for one in examples]
        found[name] = measure(plain, served, examples, arguments.repeats)
    seconds = {run: sum(prompt["seconds"][run] for prompt in found.values()) for run in ("loop", "packed")}
    num_values = len(rows) * len(found)
    print_report(
        "perplexity",
        num_values / seconds["packed"],
        num_values / seconds["loop"],
        "examples/s",
        {**vars(arguments), "threads": torch.get_num_threads(), "prompts": found},
        higher_is_better=True,
    )


def measure(plain: Any, served: Any, examples: list[EncodedExample], repeats: int) -> dict[str, Any]:
    """Measure both ways in turn; returns best seconds, mean perplexity and tokens of each."""
    values: dict[str, list[float]] = {}

    def loop() -> None:
        values["loop"] = [one_perplexity(plain, example) for example in examples]

    def packed() -> None:
        values["packed"] = example_perplexities(served, examples, default_token_budget())

    seconds: dict[str, list[float]] = {"loop": [], "packed": []}
    for _ in range(repeats):
        seconds["loop"].append(timed(loop))
        seconds["packed"].append(timed(packed))
    means = {name: mean_perplexity(found) for name, found in values.items()}
    if plain.dtype == torch.float32:
        assert all(abs(a - b) <= 1e-4 * a for a, b in zip(values["loop"], values["packed"], strict=True)), (
            values
        )
    assert abs(means["packed"] - means["loop"]) <= 1e-2 * means["loop"], means
    best = {name: min(times) for name, times in seconds.items()}
    return {
        "seconds": best,
        "ratio": round(best["loop"] / best["packed"], 2),
        "mean_perplexity": means,
        "tokens": {
            "loop": sum(example.num_tokens for example in examples),
            "packed": pack(examples).num_tokens,
        },
    }


@torch.no_grad()
def one_perplexity(model: Any, example: EncodedExample) -> float:
    """Return exp(mean NLL of the answer) of one example, logits at all positions, as plain scripts do."""
    ids, mask, labels = (tensor.to(model.device) for tensor in padded_rows([example]))
    logits = model(input_ids=ids, attention_mask=mask).logits[0, :-1].float()
    return F.cross_entropy(logits, labels[0, 1:], ignore_index=-100).exp().item()


if __name__ == "__main__":
    main()
