"""Generate an output for every row of a JSON file with a registered adapter or any base, on Ray Data.

    python ray_jobs/batch_infer.py --model models:/quickstart@champion \\
        --input data/sample/private_test.json --output results/outputs.json
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workflows.stopping import leave_at_signals

if __name__ == "__main__":
    leave_at_signals()  # while the rest loads

from qlora.config import MAX_LENGTH_TOKENS, InputError
from ray_jobs.cli import (
    CommandParser,
    add_data_options,
    add_decoding_options,
    add_model_options,
    decoding_settings,
    files_read,
    model_options,
    positive_int,
    positive_number,
    row_shape,
    show_line,
    tell_unused,
)
from tuning.space import START_TIMEOUT_SECONDS
from workflows.preflight import check_output, check_temporary_folder
from workflows.results import Output, open_output
from workflows.session import EXIT_ROWS_FAILED, StoppedError, connect_ray, go_on, resume_with, run

if TYPE_CHECKING:
    from inference.pipeline import Pool, Work
    from workflows.model_choice import ModelChoice


def main() -> None:
    """Parse, validate, generate, write."""
    arguments = _arguments()
    with open_output(arguments.output, files_read(arguments, arguments.input)) as output:
        num_failed, words = _generate(arguments, output)
    print(words)
    if num_failed:
        sys.exit(EXIT_ROWS_FAILED)


def _chosen(arguments: argparse.Namespace) -> tuple["ModelChoice", "Work"]:
    """Choose the model and the work on every row, and tell people what options change of a version's own."""
    decoding, shape = decoding_settings(arguments), row_shape(arguments)
    from qlora.base.model import context_tokens, pinned
    from qlora.data.examples import found_shape
    from qlora.data.prompts import check_chat
    from workflows.checked_base import load_facts
    from workflows.model_choice import choose_model, reading_in_words

    found = found_shape(arguments.input, shape)
    tell_unused(found, arguments.input)
    is_chat = found.holds_conversations
    model = choose_model(model_options(arguments, arguments.model or arguments.adapter, is_chat))
    config, tokenizer = load_facts(model.base, is_packed=False)
    check_chat(model.prompt, tokenizer, model.base.name)
    context = context_tokens(config) or MAX_LENGTH_TOKENS
    room = context - decoding.max_new_tokens
    if room < 1:
        problem = f"{decoding.max_new_tokens} leaves no room for a prompt within {context}"
        raise InputError("options:max_new_tokens", problem)
    for line in (*model.overridden, reading_in_words(model, tokenizer)):
        if line:
            print(line)
    from inference.engine import ServedModel
    from inference.pipeline import Work

    served = ServedModel(pinned(model.base), model.adapter_folder)
    return model, Work(served, model.prompt, decoding, room, model.prompt.end_ids(tokenizer))


def _generate(arguments: argparse.Namespace, output: Output) -> tuple[int, str]:
    """Generate for the rows of the input; returns how many failed, and what to tell people."""
    model, work = _chosen(arguments)
    from inference.attempts import EnginesDiedError
    from inference.books import Progress
    from inference.job import JobResult, model_facts, open_job, run_job
    from qlora.base.model import base_revision
    from qlora.data.sources import joined
    from workflows.batch_summary import closing_words, note_prediction
    from workflows.model_choice import trained_on_in_words

    check_output(output.path, files_read(arguments, arguments.input))
    check_temporary_folder()

    def show(progress: Progress) -> None:
        go_on()
        if not arguments.quiet:
            show_line(str(progress), progress.num_done == progress.num_rows)

    def record(job_id: str, result: JobResult) -> None:
        if model.registered:
            output.settle()
            prompt, source = model.prompt.name, joined(arguments.input)
            note_prediction(model.registered, job_id, result, work.decoding, source, output, prompt)

    with open_job(arguments.input, output.path, row_shape(arguments)) as rows:
        resume_with("the job can go on: run the same command again, with --resume")
        uri = model.registered.model_uri if model.registered else None
        facts = model_facts(work, uri, base_revision(model.base.name))
        if seen := trained_on_in_words(model, rows.all(), len(rows)):
            print(seen)

        def start() -> "Pool":
            if not arguments.quiet:
                show_line(f"{len(rows)} rows; starting Ray and loading engines", False)
            return _pool(arguments, work.served.base.name)

        try:
            result = run_job(
                work,
                rows,
                output.path,
                facts,
                start,
                resume=arguments.resume,
                progress=show,
                record=record,
                price_per_gpu_hour=arguments.price_per_gpu_hour,
            )
        except EnginesDiedError as error:
            raise StoppedError(str(error)) from error
    return result.num_failed, closing_words(result, output.place)


def _pool(arguments: argparse.Namespace, base: str) -> "Pool":
    """Connect Ray, and plan a pool of engines of a base that it can run."""
    from workflows.cluster.pool import ready_pool

    return ready_pool(connect_ray(), base, arguments.workers, arguments.device, arguments.start_timeout)


def _arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--model",
        metavar="URI",
        help="models:/NAME@ALIAS or models:/NAME/VERSION, with the base, quantisation and prompt that it is "
        "served with",
    )
    add_model_options(parser)
    parser.add_argument(
        "--input",
        metavar="FILE",
        required=True,
        nargs="+",
        help="rows to answer: JSON, JSON Lines, CSV, Parquet or Arrow; several files are one set",
    )
    add_data_options(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        required=True,
        help="where to write id and output of all rows: .jsonl, .parquet, else a JSON list",
    )
    add_decoding_options(parser)
    parser.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        help="engines in the pool (default: one a GPU, or one a node)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), help="what engines run on (default: GPUs if the cluster has any)"
    )
    parser.add_argument(
        "--price-per-gpu-hour",
        type=positive_number,
        metavar="P",
        help="what a GPU costs an hour, in any currency, to be told what the job costs",
    )
    parser.add_argument(
        "--start-timeout",
        type=positive_int,
        metavar="SECONDS",
        default=int(START_TIMEOUT_SECONDS),
        help="that a cluster has to bring the first node for an engine (default: %(default)d)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that a stopped run of the same command finished"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress of rows on the screen")
    arguments = parser.parse_args()
    if arguments.model and arguments.adapter:
        parser.error("--model and --adapter both name an adapter; give one")
    if not (arguments.model or arguments.base_model or arguments.adapter):
        parser.error("give --model URI, or --base-model BASE and, if wanted, --adapter ADAPTER")
    return arguments


if __name__ == "__main__":
    run(main)
