"""Generate an output for every row of a JSON file with a registered adapter or any base, on Ray Data.

    python ray_jobs/batch_infer.py --model models:/quickstart@champion --input data/sample/private_test.json --output results/outputs.json
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qlora.config import MAX_LENGTH_TOKENS, DecodingSettings, InputError, validated
from ray_jobs.command import (
    CommandParser,
    add_base_options,
    connect_ray,
    local_adapter,
    positive_int,
    prompt_name,
    run,
    served_base,
    show_progress,
)


def _arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    add_base_options(parser)
    parser.add_argument("--model", metavar="URI", help="models:/NAME@ALIAS or models:/NAME/VERSION, in place of --base-model and --adapter")
    parser.add_argument("--input", metavar="FILE", required=True, help="JSON list of rows with id and instruction")
    parser.add_argument("--output", metavar="FILE", required=True, help="where to write the JSON list of id and output")
    parser.add_argument("--num-beams", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--min-new-tokens", type=int)
    parser.add_argument("--length-penalty", type=float, default=1.0)
    parser.add_argument("--early-stopping", choices=("true", "false", "never"), help="when beam search stops (default: false)")
    parser.add_argument("--do-sample", action="store_true")
    for name, kind in {"--top-p": float, "--top-k": int, "--temperature": float, "--seed": int}.items():
        parser.add_argument(name, type=kind, metavar=name[2].upper(), help="with --do-sample")
    parser.add_argument("--workers", type=positive_int, metavar="N", help="engines in the pool (default: one a GPU, or one)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that a stopped run of the same command finished")
    arguments = parser.parse_args()
    if arguments.model and (arguments.base_model or arguments.adapter):
        parser.error("--model names base and adapter; leave --base-model and --adapter out")
    if not (arguments.model or arguments.base_model or arguments.adapter):
        parser.error("give --model URI, or --base-model BASE and, if wanted, --adapter ADAPTER")
    return arguments


def main() -> None:
    """Parse, validate, generate, write."""
    arguments = _arguments()
    options = {key: getattr(arguments, key) for key in DecodingSettings.model_fields}
    decoding = validated("options", lambda: DecodingSettings(**options))
    from qlora.base_model import load_config, load_tokenizer
    from qlora.data import examples_digest, load_examples
    from qlora.prompts import encode_prompts, load_prompt
    examples = load_examples(arguments.input, need_output=False)
    prompt = load_prompt(prompt_name(arguments), arguments.shots, arguments.shots_from)
    if Path(arguments.output).is_dir():
        raise InputError(arguments.output, "is a folder; name a file")
    adapter, adapter_base = local_adapter(arguments.model or arguments.adapter)
    base = served_base(arguments.base_model, adapter_base, arguments)
    context_tokens = getattr(load_config(base.name).get_text_config(), "max_position_embeddings", MAX_LENGTH_TOKENS)
    prompts = encode_prompts(load_tokenizer(base.name), prompt, examples, context_tokens - decoding.max_new_tokens, arguments.input)

    from inference.engine import ServedModel
    from inference.pipeline import default_workers, generate_texts
    from inference.predictions import Journal, write_predictions
    settings = {"base": base.model_dump(), "adapter": arguments.model or arguments.adapter, "decoding": decoding.model_dump(),
                "prompts": [list(tokens) for tokens in prompts], "input": examples_digest(examples)}
    journal = Journal(Path(arguments.output), settings, resume=arguments.resume)
    missing = {index: tokens for index, tokens in enumerate(prompts) if index not in journal.texts}
    started = time.monotonic()
    if missing:
        connect_ray()
        for index, text in generate_texts(ServedModel(base, adapter), decoding, missing, arguments.workers or default_workers()):
            journal.append(index, text)
            show_progress(started, len(journal.texts) - len(examples) + len(missing), len(missing), "rows")
    write_predictions(Path(arguments.output), examples, journal.texts)
    journal.remove()
    rate = len(missing) / (time.monotonic() - started)
    print(f"{len(examples)} rows ({len(missing)} generated now, {rate:.2f} rows/s) -> {arguments.output}")


if __name__ == "__main__":
    run(main)
