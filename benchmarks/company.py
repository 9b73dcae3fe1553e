"""The influence of company: one trial's perplexity beside other trials on its base, and alone.

    python benchmarks/company.py [--base-model BASE] [--train FILE] [--public FILE] \\
        [--train-examples 512] [--others 7]

In float32 a trial together with others equals the same trial alone to 1e-4 (tests/test_bank.py,
tests/test_gpu.py). In bfloat16 sums round, and a GPU adds some of them up in another order every time. The
line's `baseline` is how far public perplexity of the same trial, alone, strays from run to run (the largest
relative difference of its evaluations from the mean of the repeats), its `ours` how far it strays in company;
`ratio` at or above 1 means that company can't be told from chance.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import print_report
from qlora.base.device import default_token_budget
from qlora.base.model import load_tokenizer
from qlora.config import DEFAULT_BASE, BaseModelSettings, TrialSettings
from qlora.data.examples import load_examples
from qlora.data.prompts import EncodedExample, encode_examples, load_prompt
from qlora.lora.bank import AdapterBank, load_bank
from qlora.perplexity import adapter_perplexities, mean_perplexity
from qlora.training import StepResult, Training, advance_together

_EVALUATIONS = 4  # of an epoch


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-model", default=DEFAULT_BASE)
    parser.add_argument("--train", default="data/sample/train.json")
    parser.add_argument("--public", default="data/sample/public_test.json")
    parser.add_argument("--train-examples", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--others", type=int, default=7, help="trials beside it")
    parser.add_argument("--repeats", type=int, default=3, help="runs alone")
    parser.add_argument("--budget", type=int, default=default_token_budget(), help="tokens of a pass")
    arguments = parser.parse_args()
    bank, tokenizer = (
        load_bank(BaseModelSettings(name=arguments.base_model)),
        load_tokenizer(arguments.base_model),
    )
    rows = load_examples(arguments.train, need_output=True)[: arguments.train_examples]
    train = encode_examples(tokenizer, load_prompt(), rows, arguments.train)
    public = encode_examples(
        tokenizer, load_prompt(), load_examples(arguments.public, need_output=True), arguments.public
    )

    def curve(seed: int, others: int, budget: int) -> list[float]:
        return perplexity_curve(
            bank,
            train,
            public,
            TrialSettings(lora_r=64, learning_rate=arguments.learning_rate, seed=seed),
            others,
            budget,
        )

    alone = [curve(0, 0, arguments.budget) for _ in range(arguments.repeats)]
    in_company = curve(0, arguments.others, arguments.budget)
    regrouped = curve(0, 0, arguments.budget // 8)
    other_seeds = [curve(seed, 0, arguments.budget) for seed in (1, 2)]
    means = [sum(values) / len(values) for values in zip(*alone, strict=True)]

    def strays(runs: list[list[float]]) -> float:
        return max(abs(value / mean - 1) for run in runs for value, mean in zip(run, means, strict=True))

    print_report(
        "company",
        max(strays([in_company]), 1e-9),
        strays(alone),
        "relative difference of public perplexity",
        {
            **vars(arguments),
            "curves": {
                "alone": alone,
                "in company": in_company,
                "alone in smaller passes": regrouped,
                "alone under other seeds": other_seeds,
            },
            "strays": {
                "alone in smaller passes": strays([regrouped]),
                "alone under other seeds": strays(other_seeds),
            },
        },
        higher_is_better=False,
    )


def perplexity_curve(
    bank: AdapterBank,
    train: list[EncodedExample],
    public: list[EncodedExample],
    settings: TrialSettings,
    others: int,
    budget: int,
) -> list[float]:
    """Measure public perplexity along an epoch of one trial, with others of smaller ranks and dropouts."""
    company = [
        settings.model_copy(
            update={
                "seed": 100 + index,
                "lora_r": 2 ** (2 + index % 4),
                "lora_dropout": 0.02 * (1 + index % 4),
            }
        )
        for index in range(others)
    ]
    trainings = [Training(bank, train, one) for one in (settings, *company)]
    steps = trainings[0].timetable.total_steps
    points = {(index + 1) * steps // _EVALUATIONS for index in range(_EVALUATIONS)}
    found = []
    for step in range(1, steps + 1):
        assert all(isinstance(result, StepResult) for result in advance_together(trainings, budget)), (
            "a trial diverged"
        )
        if step in points:
            found.append(
                mean_perplexity(adapter_perplexities(bank, [(trainings[0].adapter, public)], budget)[0])
            )
    for training in trainings:
        bank.detach(training.adapter)
    return found


if __name__ == "__main__":
    main()
