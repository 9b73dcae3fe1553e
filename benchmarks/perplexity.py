"""Public perplexity: a plain loop, one example at a time, against the packed stream.

    python benchmarks/perplexity.py [--data FILE] [--examples 16]

Same process, same NF4 base. Every value must agree to 1e-3 in float32, the mean to 1 % in bfloat16, or nothing is printed.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from benchmarks.packed_stream import padded_rows, timed
from benchmarks.report import print_report
from qlora.attention import use_packed_attention
from qlora.base_model import default_token_budget, load_base, load_tokenizer
from qlora.config import DEFAULT_BASE, BaseModelSettings
from qlora.data import load_examples
from qlora.perplexity import example_perplexities, mean_perplexity
from qlora.prompts import EncodedExample, encode_examples, load_prompt


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", default=DEFAULT_BASE)
    parser.add_argument("--data", default="data/sample/public_test.json")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    rows = load_examples(arguments.data, need_output=True)[:arguments.examples]
    examples = encode_examples(load_tokenizer(arguments.base_model), load_prompt(), rows, "data")
    model = load_base(BaseModelSettings(name=arguments.base_model))
    own_attention = model.config._attn_implementation
    values: dict[str, list[float]] = {}

    def loop() -> None:
        model.set_attn_implementation(own_attention)
        values["loop"] = [one_perplexity(model, example) for example in examples]

    def packed() -> None:
        use_packed_attention(model)
        values["packed"] = example_perplexities(model, examples, default_token_budget())

    seconds = {run.__name__: min(timed(run) for _ in range(arguments.repeats)) for run in (loop, packed)}
    means = {name: mean_perplexity(found) for name, found in values.items()}
    if model.dtype == torch.float32:
        assert all(abs(a - b) <= 1e-3 * a for a, b in zip(values["loop"], values["packed"], strict=True)), values
    assert abs(means["packed"] - means["loop"]) <= 1e-2 * means["loop"], means
    print_report("perplexity", len(examples) / seconds["packed"], len(examples) / seconds["loop"], "examples/s",
                 {**vars(arguments), "threads": torch.get_num_threads(), "seconds": seconds,
                  "mean_perplexity": means}, higher_is_better=True)


@torch.no_grad()
def one_perplexity(model: Any, example: EncodedExample) -> float:
    """exp(mean NLL of the answer) of one example, logits at all positions, as plain scripts compute it."""
    ids, mask, labels = (tensor.to(model.device) for tensor in padded_rows([example]))
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
    return math.exp((losses.sum() / (labels[:, 1:] != -100).sum()).item())


if __name__ == "__main__":
    main()
