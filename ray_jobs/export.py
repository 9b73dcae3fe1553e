"""Export a tuned adapter for other programs, loaded back and scored before it is called done.

    python ray_jobs/export.py --model models:/wide@champion --format merged --output exports/wide
    python ray_jobs/export.py --model models:/wide@champion --format vllm --output exports/wide-lora
    python ray_jobs/export.py --model models:/wide@champion --format gguf --gguf-type q8_0 \\
        --output exports/wide-gguf
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workflows.stopping import leave_at_signals

if __name__ == "__main__":
    leave_at_signals()  # while the rest loads

from qlora.config import InputError
from ray_jobs.cli import (
    CommandParser,
    add_base_options,
    add_data_options,
    add_max_length_option,
    model_options,
    positive_int,
    row_shape,
    show_progress,
    tell_unused,
)
from workflows.preflight import check_writable
from workflows.results import output_folder
from workflows.session import run

if TYPE_CHECKING:
    from workflows.export.work import ExportSettings, Work

_BELONGS_TO = {"dtype": "merged", "gguf_type": "gguf", "rank": "vllm"}  # option -> format


def main() -> None:
    """Parse, validate, export, record."""
    arguments = _arguments()
    output = output_folder(arguments.output)
    check_writable(output.parent)
    work = _work(arguments, _checked_options(arguments))
    from workflows.export.steps import check, export, finished, record

    if (content := finished(work)) is None:
        check(work)
        content = export(work, _Screen().show)
    record(work, content)
    for note in content["notes"]:
        print(note)
    figures = content["figures"]
    export_ppl, champion_ppl = figures["export_perplexity"], figures["champion_perplexity"]
    print(
        f"public perplexity {export_ppl:.4f}, champion {champion_ppl:.4f} ({figures['difference']:+.3%}), "
        f"over {figures['count']:.0f} examples -> {arguments.output}"
    )
    print(f"how to use it: {output / 'README.md'}")


class _Screen:
    """Show the progress of one scoring after the other."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}

    def show(self, what: str, done: int, total: int) -> None:
        """Show how many examples the champion or the export was scored on."""
        started = self._started.setdefault(what, time.monotonic())
        show_progress(started, done, total, f"examples of the {what}'s score")


def _work(arguments: argparse.Namespace, settings: "ExportSettings") -> "Work":
    """Find the model and the examples. Raises InputError for what can't be had or does not fit."""
    from qlora.base.model import length_reason, longest_example
    from qlora.data.examples import found_shape
    from qlora.data.prompts import check_chat, cut_in_words, encode_examples
    from workflows.checked_base import load_facts
    from workflows.export.work import Work, read_public_set
    from workflows.model_choice import choose_model, find_adapter, reading_in_words

    shape = row_shape(arguments)
    version = find_adapter(arguments.model).registered
    public = read_public_set(arguments.data, version, shape)
    if arguments.data:
        tell_unused(found_shape(arguments.data, shape), arguments.data)
    choice = choose_model(model_options(arguments, arguments.model, public.holds_conversations))
    config, tokenizer = load_facts(choice.base, is_packed=True)
    check_chat(choice.prompt, tokenizer, choice.base.name)
    max_length = longest_example(config, choice.max_length)
    reason = length_reason(config, choice.max_length)
    encoded = encode_examples(tokenizer, choice.prompt, public.examples, public.words, max_length, reason)
    other = version is not None and version.tags.get("public_digest") not in (None, public.digest)
    own = "other examples than the version's public perplexity was measured on" if other else ""
    for line in (*choice.overridden, reading_in_words(choice, tokenizer), cut_in_words(encoded), own):
        if line:
            print(line)
    return Work(settings, choice, config, tokenizer, public, encoded, max_length)


def _checked_options(arguments: argparse.Namespace) -> "ExportSettings":
    """Return how the export is asked for. Raises InputError for an option of another format."""
    given = {"dtype": arguments.merged_dtype, "gguf_type": arguments.gguf_type, "rank": arguments.rank}
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        if _BELONGS_TO[key] != arguments.format:
            option = f"--{key.replace('_', '-')}"
            raise InputError(option, f"belongs to --format {_BELONGS_TO[key]}; leave it out")
    from workflows.export.work import ExportSettings

    output = output_folder(arguments.output)
    return ExportSettings(arguments.format, output, original_weights=arguments.original_weights, **given)


def _arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--model",
        metavar="ADAPTER",
        required=True,
        help="the adapter: models:/NAME@ALIAS, models:/NAME/VERSION or a PEFT folder",
    )
    parser.add_argument(
        "--format",
        choices=("merged", "vllm", "gguf"),
        required=True,
        help="a transformers folder with the adapter in its weights, the adapter as vLLM serves it, or a "
        "file for llama.cpp and Ollama",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", required=True, help="where to write it; a folder that is not there yet"
    )
    parser.add_argument(
        "--dtype",
        dest="merged_dtype",
        choices=("bfloat16", "float16"),
        help="of merged weights (default: bfloat16)",
    )
    parser.add_argument(
        "--gguf-type", choices=("f16", "q8_0"), help="how a GGUF file stores matrices (default: f16)"
    )
    parser.add_argument(
        "--rank",
        type=positive_int,
        metavar="R",
        help="reduce an adapter for vLLM to this rank, by singular values (default: as it is)",
    )
    parser.add_argument(
        "--original-weights",
        action="store_true",
        help="put the adapter onto the base's own weights in place of the NF4 values that it was tuned on; "
        "the difference is told",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        nargs="+",
        help="rows with answers to score on (default: the public examples of the version's own sweep)",
    )
    add_data_options(parser)
    add_base_options(parser)
    add_max_length_option(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
