"""Public perplexity of a base, with or without an adapter, under any prompt.

    python ray_jobs/evaluate.py --adapter models:/quickstart@champion \\
        --data data/sample/public_test.json --output results/champion.json
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workflows.stopping import leave_at_signals

if __name__ == "__main__":
    leave_at_signals()  # while the rest loads

from ray_jobs.cli import (
    CommandParser,
    add_data_options,
    add_max_length_option,
    add_model_options,
    files_read,
    model_options,
    row_shape,
    show_progress,
    tell_unused,
)
from workflows.preflight import check_output
from workflows.results import Output, open_output
from workflows.session import FailedError, resume_with, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora.data.prompts import EncodedExample
    from workflows.model_choice import ModelChoice


def main() -> None:
    """Parse, validate, measure, write."""
    arguments = _arguments()
    sources = files_read(arguments, arguments.data)
    with open_output(arguments.output, sources) as output:
        check_output(output.path, sources)
        words = _evaluate(arguments, output)
    print(words)


def _evaluate(arguments: argparse.Namespace, output: Output) -> str:
    """Measure and write; returns what to tell people."""
    from qlora.data.examples import examples_digest, found_shape, load_examples
    from qlora.data.sources import joined

    shape = row_shape(arguments)
    examples = load_examples(arguments.data, shape, need_output=True)
    found = found_shape(arguments.data, shape)
    tell_unused(found, arguments.data)
    from qlora.base.model import length_reason, longest_example
    from qlora.data.prompts import check_chat, cut_in_words, encode_examples
    from workflows.checked_base import load_facts
    from workflows.model_choice import choose_model, reading_in_words, trained_on_in_words

    model_choice = choose_model(model_options(arguments, arguments.adapter, found.holds_conversations))
    base, prompt = model_choice.base, model_choice.prompt
    config, tokenizer = load_facts(base, is_packed=True)
    max_length = longest_example(config, model_choice.max_length)
    check_chat(prompt, tokenizer, base.name)
    reason = length_reason(config, model_choice.max_length)
    encoded = encode_examples(tokenizer, prompt, examples, arguments.data, max_length, reason)
    seen = trained_on_in_words(model_choice, examples, len(examples))
    reading = reading_in_words(model_choice, tokenizer)
    for line in (*model_choice.overridden, reading, cut_in_words(encoded), seen):
        if line:
            print(line)

    values, mean, dtype = _measure(model_choice, encoded)
    digest = examples_digest(examples)
    settings = {
        "base_model": base.name,
        "adapter": arguments.adapter,
        "quantization": base.quantization,
        "dtype": dtype,
        "data": joined(arguments.data),
        "data_digest": digest,
        "not_used": sorted(found.unused),
        "max_length": max_length,
        "prompt": prompt.name,
        "prompt_digest": prompt.digest,
        "shots": arguments.shots,
        "shots_from": arguments.shots_from,
    }
    result = {
        "mean_perplexity": mean,
        "count": len(values),
        "perplexities": {str(example.id): value for example, value in zip(examples, values, strict=True)},
        "settings": settings,
    }
    from qlora.files import write_json

    write_json(output.path, result)
    if model_choice.registered is not None:
        output.settle()
        from tracking.registry import note_use

        told = {key: settings[key] for key in ("data", "data_digest", "prompt", "shots")}
        metrics = {"mean_perplexity": mean, "count": len(values)}
        resume_with(f"the result is in {output.place}; for its record run the same command again")
        note_use(model_choice.registered, "evaluation", told, metrics, [output.path])
    return f"mean perplexity {mean:.4f} over {len(values)} examples -> {output.place}"


def _arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    add_model_options(parser)
    parser.add_argument(
        "--data",
        metavar="FILE",
        required=True,
        nargs="+",
        help="rows with answers: JSON, JSON Lines, CSV, Parquet or Arrow; several files are one set",
    )
    add_data_options(parser)
    parser.add_argument(
        "--loss",
        choices=("all", "last"),
        help="score all turns of the assistant in a chat, or the last (default: as a registered adapter was "
        "trained, else all)",
    )
    add_max_length_option(parser)
    parser.add_argument("--output", metavar="FILE", required=True, help="where to write the JSON result")
    return parser.parse_args()


def _measure(choice: "ModelChoice", examples: "Sequence[EncodedExample]") -> tuple[list[float], float, str]:
    """Measure the perplexity of each example; returns them, their mean, and the dtype of the weights.

    Raises FailedError for a mean that is no finite number.
    """
    from qlora.base.device import default_token_budget
    from qlora.packed.agreement import pack_attention
    from qlora.perplexity import example_perplexities, mean_perplexity
    from qlora.served import load_served

    model = load_served(choice.base, choice.adapter_folder)
    pack_attention(model, choice.base.name)
    progress = partial(show_progress, time.monotonic(), unit="examples")
    values = example_perplexities(model, examples, default_token_budget(), progress)
    mean = mean_perplexity(values)
    if not math.isfinite(mean):
        count = sum(not math.isfinite(value) for value in values)
        raise FailedError(
            f"the perplexity of {count} of {len(values)} examples is no finite number: "
            "the weights or the dtype are no good; nothing is written"
        )
    return values, mean, str(next(model.parameters()).dtype).removeprefix("torch.")


if __name__ == "__main__":
    run(main)
