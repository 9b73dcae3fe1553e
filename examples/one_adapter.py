"""Train one adapter on a frozen base and measure it: the learning core in forty lines, without Ray.

python examples/one_adapter.py [--base smollm2-135m-instruct] [--train FILE] [--public FILE] \\
        [--out results/one_adapter]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qlora.base.device import default_token_budget
from qlora.base.model import load_tokenizer
from qlora.config import DEFAULT_BASE, BaseModelSettings, TrialSettings
from qlora.data.examples import load_examples
from qlora.data.prompts import encode_examples, load_prompt
from qlora.lora.bank import load_bank
from qlora.perplexity import adapter_perplexities, mean_perplexity
from qlora.training import Training


def main() -> None:
    """Load a bank, train, measure, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default=DEFAULT_BASE)
    parser.add_argument("--train", default="data/sample/train.json")
    parser.add_argument("--public", default="data/sample/public_test.json")
    parser.add_argument("--out", type=Path, default=Path("results/one_adapter"))
    arguments = parser.parse_args()
    tokenizer, prompt, budget = load_tokenizer(arguments.base), load_prompt(), default_token_budget()
    train, public = (
        encode_examples(tokenizer, prompt, load_examples(path, need_output=True), path)
        for path in (arguments.train, arguments.public)
    )
    bank = load_bank(BaseModelSettings(name=arguments.base))
    settings = TrialSettings(learning_rate=1e-3, lora_r=8, lora_alpha=16, lora_dropout=0.05, epochs="1+1")
    training = Training(bank, train, settings)
    while not training.finished:
        result = training.advance(budget)
        print(f"step {training.step}: loss {result.loss:.4f}, learning rate {result.learning_rate:.2e}")
    base, adapted = adapter_perplexities(bank, [(None, public), (training.adapter, public)], budget)
    print(f"public perplexity {mean_perplexity(base):.4f} -> {mean_perplexity(adapted):.4f}")
    bank.save(training.adapter, arguments.out)
    print(f"saved for PEFT in {arguments.out}")


if __name__ == "__main__":
    main()
