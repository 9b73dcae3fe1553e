"""Texts of adapters in training, written between their steps: all adapters at once, against one by one.

    python benchmarks/texts_between.py [--base-model BASE | --shape 7b --tokenizer FOLDER] [--train FILE] \\
        [--public FILE] [--trials 7] [--steps 20]

Trials of several ranks train together for --steps steps; then each writes greedy texts for the public
examples. Told is also what that costs a sweep: the seconds of one such evaluation beside those of an epoch of
--train-examples, which it comes after. Texts of random weights (--shape) end nowhere, so that they cost the
most.
"""

import argparse
import sys
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.models import add_model_options, fold, load_model
from benchmarks.packed_stream import timed
from benchmarks.report import print_report
from inference.banked import Asked, BankedGenerator
from qlora.base.device import default_token_budget
from qlora.base.fused import fuse
from qlora.base.model import dequantised_if_it_fits, load_base, load_tokenizer
from qlora.config import BaseModelSettings, DecodingSettings, TrialSettings
from qlora.data.examples import load_examples
from qlora.data.prompts import EncodedExample, encode_examples, load_prompt
from qlora.lora.bank import AdapterBank
from qlora.packed.attention import use_packed_attention
from qlora.perplexity import adapter_perplexities
from qlora.training import Training, advance_together

_RANKS = (8, 16, 32, 64, 128, 64, 32)


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    if arguments.shape:
        model, tokenizer = load_model(arguments)
    else:
        model = dequantised_if_it_fits(load_base(BaseModelSettings(name=arguments.base_model)))
        tokenizer = load_tokenizer(arguments.base_model)
    use_packed_attention(model)
    if model.device.type == "cuda":
        fuse(model)

    def encoded(file: str) -> list[EncodedExample]:
        rows = load_examples(file, need_output=True)
        examples = encode_examples(tokenizer, load_prompt(), rows, file)
        if arguments.shape:
            examples = [EncodedExample(one.id, fold(one.prompt), fold(one.answer)) for one in examples]
        return examples

    bank, budget = AdapterBank(model, arguments.base_model), default_token_budget()
    train, public = encoded(arguments.train), encoded(arguments.public)[: arguments.public_examples]
    plain = TrialSettings(learning_rate=1e-3, lora_alpha=32, epochs=100)
    ranks = [_RANKS[number % len(_RANKS)] for number in range(arguments.trials)]
    kinds = [plain.model_copy(update={"lora_r": rank, "seed": seed}) for seed, rank in enumerate(ranks)]
    runs = [Training(bank, train, settings) for settings in kinds]
    for _ in range(arguments.steps):
        advance_together(runs, budget)
    steps_seconds = timed(lambda: [advance_together(runs, budget) for _ in range(arguments.steps)])
    evaluate = [(run.adapter, public) for run in runs]
    adapter_perplexities(bank, evaluate, budget)
    perplexity_seconds = timed(lambda: adapter_perplexities(bank, evaluate, budget))

    decoding = DecodingSettings(num_beams=1, max_new_tokens=arguments.new_tokens)
    generator = BankedGenerator(bank, tokenizer, decoding)
    asked = [Asked(run.adapter, [one.prompt for one in public]) for run in runs]
    texts = generator.texts(asked)  # kernels are compiled
    generator.texts(asked[:1])
    together = timed(lambda: generator.texts(asked))
    alone: list[list[str]] = []
    one_by_one = timed(lambda: alone.extend(generator.texts([one])[0] for one in asked))
    both = zip(chain.from_iterable(texts), chain.from_iterable(alone), strict=True)
    epoch_seconds = steps_seconds / arguments.steps * -(-arguments.train_examples // 16)
    extra = {
        "step_of_all_seconds": round(steps_seconds / arguments.steps, 4),
        "perplexities_seconds": round(perplexity_seconds, 3),
        "share_of_an_epoch": round(together / (epoch_seconds + together), 4),
        "equal_texts": sum(one == other for one, other in both),
        "texts": sum(map(len, texts)),
    }
    print_report(
        "texts_between", together, one_by_one, "seconds", {**vars(arguments), **extra}, higher_is_better=False
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--train", default="data/sample/train.json")
    parser.add_argument("--public", default="data/sample/public_test.json")
    parser.add_argument("--public-examples", type=int, default=250)
    parser.add_argument("--train-examples", type=int, default=3000, help="of the epoch that is told of")
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20 if torch.cuda.is_available() else 1)
    parser.add_argument("--new-tokens", type=int, default=128)
    return parser.parse_args()


if __name__ == "__main__":
    main()
