"""Owns what all commands share: their options, and the line of progress.

Imports nothing heavy until it is needed.
"""

import argparse
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qlora.config import MAX_LENGTH_TOKENS, DecodingSettings, InputError, validated
from qlora.data.row_shapes import FoundShape, RowShape
from workflows.session import EXIT_BAD_INPUT

if TYPE_CHECKING:
    from workflows.model_choice import ModelOptions

_SECONDS_BETWEEN_LINES = 20.0
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class CommandParser(argparse.ArgumentParser):
    """argparse that ends a wrong option with one `error:` line and exit code 2."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Print `error: ...` and exit with 2."""
        print(f"error: {Path(sys.argv[0]).name}: {message}; see --help", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a base, how it is stored, and a prompt."""
    parser.add_argument(
        "--base-model",
        metavar="BASE",
        help="the frozen model: smollm2-135m-instruct, a local folder or a hub id NAME[@REVISION] "
        "(default: the one that the adapter was trained on)",
    )
    parser.add_argument(
        "--quantization",
        choices=("nf4", "none"),
        help="how the base's weights are stored (default: as a registered adapter was trained, else nf4)",
    )
    parser.add_argument(
        "--prompt",
        metavar="NAME",
        help="the text around each instruction: a template of prompts/ or a YAML file, or `chat` for the "
        "base's own chat template (default: the one that a registered adapter was trained with, `chat` for "
        "conversations, else `default`)",
    )
    parser.add_argument(
        "--thinking",
        choices=("on", "off"),
        help="ask a chat template for thoughts before the answer, or for none (default: as it does itself)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a base, an adapter and a prompt, and how the model is run."""
    add_base_options(parser)
    parser.add_argument(
        "--adapter",
        metavar="ADAPTER",
        help="the adapter on it: a PEFT folder, models:/NAME@ALIAS or models:/NAME/VERSION (default: none)",
    )
    parser.add_argument(
        "--shots",
        type=positive_int,
        default=0,
        metavar="N",
        help="examples shown in the prompt, under `few-shot` unless another is named (default: none)",
    )
    parser.add_argument(
        "--shots-from", metavar="FILE", help="the training file whose last N examples are shown"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="what is computed in (default: bfloat16 on GPUs that have it, else float32)",
    )


def add_max_length_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where examples are cut to be scored."""
    parser.add_argument(
        "--max-length",
        type=positive_int,
        metavar="N",
        help="tokens of prompt and answer behind which an example is cut (default: as a registered adapter "
        f"was measured, else {MAX_LENGTH_TOKENS}; never more than the base has positions for)",
    )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what the rows of data hold."""
    parser.add_argument(
        "--data-format",
        choices=("auto", "instruction", "messages", "conversations", "completion", "text"),
        default="auto",
        help="what rows hold (default: told by the columns of the first)",
    )
    parser.add_argument(
        "--columns",
        metavar="PART=COLUMN,...",
        default="",
        help="columns that are not named after what they hold, such as instruction=question,output=answer",
    )


def row_shape(arguments: argparse.Namespace) -> RowShape:
    """Return what `add_data_options` read. Raises InputError for columns that don't fit the format."""
    pairs = [pair.partition("=") for pair in arguments.columns.split(",") if pair]
    if not all(part and equals and column for part, equals, column in pairs):
        raise InputError("--columns", f"{arguments.columns!r} must read part=column,part=column")
    columns = {part.strip(): column.strip() for part, _, column in pairs}
    return validated("--columns", lambda: RowShape(format=arguments.data_format, columns=columns))


def files_read(arguments: argparse.Namespace, data: Sequence[str]) -> list[str]:
    """Return the files that a command reads: data, what shots are taken from, the prompt."""
    from qlora.data.prompts import prompt_file

    prompt = arguments.prompt or ("few-shot" if arguments.shots else "default")
    return [*data, *([arguments.shots_from] if arguments.shots_from else []), str(prompt_file(prompt))]


def tell_unused(shape: FoundShape, data: Sequence[str]) -> None:
    """Say which columns of data are in no prompt and no answer, if there are any."""
    if shape.unused:
        print(f"not used: {', '.join(sorted(shape.unused))} of {', '.join(data)}")


def model_options(
    arguments: argparse.Namespace, adapter: str | None, holds_conversations: bool
) -> "ModelOptions":
    """Return what `add_base_options` or `add_model_options`, and `add_data_options`, read.

    `adapter`: the one that was named. `holds_conversations`: the data that the model is used on do.
    """
    from workflows.model_choice import ModelOptions

    return ModelOptions(
        adapter=adapter,
        base_model=arguments.base_model,
        quantization=arguments.quantization,
        dtype=getattr(arguments, "dtype", None),
        prompt=arguments.prompt,
        shots=getattr(arguments, "shots", 0),
        shots_from=getattr(arguments, "shots_from", None),
        shape=row_shape(arguments),
        holds_conversations=holds_conversations,
        loss=getattr(arguments, "loss", None),
        thinking=None if arguments.thinking is None else arguments.thinking == "on",
        max_length=getattr(arguments, "max_length", None),
    )


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of DecodingSettings."""
    parser.add_argument(
        "--num-beams", type=int, default=3, metavar="N", help="beams of the search; 1 is greedy (default: 3)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="longest output in tokens (default: 128)"
    )
    parser.add_argument(
        "--min-new-tokens", type=int, metavar="N", help="shortest output in tokens (default: no limit)"
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 0 favours longer outputs, below 0 shorter ones, with beams (default: 1.0)",
    )
    parser.add_argument(
        "--early-stopping",
        choices=("true", "false", "never"),
        help="when a beam search ends: with as many outputs as beams, when better ones are unlikely, or when "
        "they are impossible (default: false)",
    )
    parser.add_argument(
        "--do-sample", action="store_true", help="draw tokens at random in place of searching for the best"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens of this total probability"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from this many of the likeliest tokens")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="below 1 sharpens the draw, above 1 flattens it"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="makes the draws repeatable")
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="above 1 makes tokens less likely that prompt or output have already (default: 1)",
    )
    parser.add_argument(
        "--no-repeat-ngram-size",
        type=int,
        metavar="N",
        help="let no sequence of N tokens stand twice (default: no limit)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end an output at this text, without it; may be given several times",
    )


def decoding_settings(arguments: argparse.Namespace) -> DecodingSettings:
    """Return what `add_decoding_options` read. Raises InputError for settings that don't fit each other."""
    options = {key: getattr(arguments, key) for key in DecodingSettings.model_fields}
    return validated("options", lambda: DecodingSettings(**options))


def positive_int(text: str) -> int:
    """Read a whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


positive_int.__name__ = "whole number"


def positive_number(text: str) -> float:
    """Read a number above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


positive_number.__name__ = "number"


def folder_name(name: str, option: str = "--name") -> str:
    """Return a name that a folder under results/ can have.

    Raises InputError, naming the option, for any other.
    """
    if not _FOLDER_NAME.fullmatch(name):
        raise InputError(
            option,
            f"{name!r} can't be a name; use up to 200 letters, digits, dots, dashes and underscores, "
            "a letter or digit first",
        )
    return name


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines whose columns begin below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


_shown_at = [time.monotonic()]


def show_progress(started: float, done: int, total: int, unit: str) -> None:
    """Show what is done of all, the rate and the time left."""
    seconds = max(time.monotonic() - started, 1e-9)
    rate, left = done / seconds, seconds / done * (total - done)
    show_line(f"{done}/{total} {unit}, {rate:.2f} {unit}/s, {left:.0f} s left", done == total)


def show_line(line: str, last: bool) -> None:
    """Rewrite a line of progress in place on a terminal; elsewhere, as in a job's log, add one each 20 s."""
    if sys.stderr.isatty():
        print(f"\r{line:<70}", end="\n" if last else "", file=sys.stderr, flush=True)
    elif (now := time.monotonic()) - _shown_at[0] > _SECONDS_BETWEEN_LINES:
        _shown_at[0] = now
        print(line, file=sys.stderr, flush=True)
