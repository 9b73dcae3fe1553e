"""Owns what all commands share: their options, and the line of progress. Imports nothing heavy until it is needed."""

import argparse
import sys
import time
from pathlib import Path
from typing import NoReturn

from qlora.config import BaseModelSettings, DecodingSettings, InputError, validated
from workflows.session import EXIT_BAD_INPUT


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
    """The options that name a base, an adapter and a prompt."""
    parser.add_argument(
        "--base-model",
        metavar="BASE",
        help="smollm2-135m-instruct, a local folder or a hub id NAME[@REVISION]",
    )
    parser.add_argument(
        "--adapter", metavar="ADAPTER", help="a PEFT folder, models:/NAME@ALIAS or models:/NAME/VERSION"
    )
    parser.add_argument(
        "--prompt", metavar="NAME", help="a template of prompts/ (default: default, or few-shot with --shots)"
    )
    parser.add_argument(
        "--shots", type=positive_int, default=0, metavar="N", help="examples shown in the prompt"
    )
    parser.add_argument("--shots-from", metavar="FILE", help="training file whose last N examples are shown")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on GPUs, float32 on CPUs"
    )


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """The options of DecodingSettings."""
    parser.add_argument("--num-beams", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--min-new-tokens", type=int)
    parser.add_argument("--length-penalty", type=float, default=1.0)
    parser.add_argument(
        "--early-stopping", choices=("true", "false", "never"), help="when beam search stops (default: false)"
    )
    parser.add_argument("--do-sample", action="store_true")
    for name, kind in {"--top-p": float, "--top-k": int, "--temperature": float, "--seed": int}.items():
        parser.add_argument(name, type=kind, metavar=name[2].upper(), help="with --do-sample")


def decoding_settings(arguments: argparse.Namespace) -> DecodingSettings:
    """What `add_decoding_options` read. Raises InputError for settings that don't fit each other."""
    options = {key: getattr(arguments, key) for key in DecodingSettings.model_fields}
    return validated("options", lambda: DecodingSettings(**options))


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


positive_int.__name__ = "whole number"


def prompt_name(arguments: argparse.Namespace) -> str:
    """The template asked for; shots alone mean few-shot."""
    return arguments.prompt or ("few-shot" if arguments.shots else "default")


def served_base(
    base: str | None, adapter_base: str | None, arguments: argparse.Namespace
) -> BaseModelSettings:
    """The base to load: as asked for, else the one that the adapter was trained on."""
    name = base or adapter_base
    if name is None:
        raise InputError("--base-model", "is missing; name a base or an adapter that says its own")
    dtype = arguments.dtype or "auto"
    return validated(
        "--base-model", lambda: BaseModelSettings(name=name, quantization=arguments.quantization, dtype=dtype)
    )


def show_progress(started: float, done: int, total: int, unit: str) -> None:
    """Done of all, rate and time left."""
    seconds = max(time.monotonic() - started, 1e-9)
    show_line(
        f"{done}/{total} {unit}, {done / seconds:.2f} {unit}/s, {seconds / done * (total - done):.0f} s left",
        done == total,
    )


def show_line(line: str, last: bool) -> None:
    """Rewrite a line of progress in place; only on a terminal, where someone looks."""
    if sys.stderr.isatty():
        print(f"\r{line:<70}", end="\n" if last else "", file=sys.stderr, flush=True)
