"""Owns what all commands share: the exit codes, the one error line, common options, and how they reach Ray.

Exit codes: 0 done, 2 bad input or configuration, 3 stopped but resumable, 4 done but for rows that failed. Imports nothing
heavy until it is needed.
"""

import argparse
import logging
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from qlora.config import BaseModelSettings, DecodingSettings, InputError, validated

PROJECT_ROOT = Path(__file__).resolve().parent.parent
EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_ROWS_FAILED = 2, 3, 4
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_AIR_NEW_OUTPUT": "0", "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0", "RAY_USAGE_STATS_ENABLED": "0",
}


class StoppedError(Exception):
    """Work was stopped before its end and can be resumed; the text says how."""


class CommandParser(argparse.ArgumentParser):
    """argparse that ends a wrong option with one `error:` line and exit code 2."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print `error: ...` and exit with 2."""
        print(f"error: {Path(sys.argv[0]).name}: {message}; see --help", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """The options that name a base, an adapter and a prompt."""
    parser.add_argument("--base-model", metavar="BASE", help="smollm2-135m-instruct, a local folder or a hub id NAME[@REVISION]")
    parser.add_argument("--adapter", metavar="ADAPTER", help="a PEFT folder, models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("--prompt", metavar="NAME", help="a template of prompts/ (default: default, or few-shot with --shots)")
    parser.add_argument("--shots", type=positive_int, default=0, metavar="N", help="examples shown in the prompt")
    parser.add_argument("--shots-from", metavar="FILE", help="training file whose last N examples are shown")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on GPUs, float32 on CPUs")


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """The options of DecodingSettings."""
    parser.add_argument("--num-beams", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--min-new-tokens", type=int)
    parser.add_argument("--length-penalty", type=float, default=1.0)
    parser.add_argument("--early-stopping", choices=("true", "false", "never"), help="when beam search stops (default: false)")
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


def served_base(base: str | None, adapter_base: str | None, arguments: argparse.Namespace) -> BaseModelSettings:
    """The base to load: as asked for, else the one that the adapter was trained on."""
    name = base or adapter_base
    if name is None:
        raise InputError("--base-model", "is missing; name a base or an adapter that says its own")
    dtype = arguments.dtype or "auto"
    return validated("--base-model", lambda: BaseModelSettings(name=name, quantization=arguments.quantization, dtype=dtype))


def local_adapter(adapter: str | None) -> tuple[str | None, str | None, Any]:
    """(PEFT folder, the base it names, its tracking.registry.RegisteredAdapter if it is registered) of an ADAPTER, fetched from the
    registry if need be; checked, not loaded."""
    if adapter is None:
        return None, None, None
    from qlora.adapters import adapter_base
    from tracking.registry import fetch_adapter, is_model_uri
    if is_model_uri(adapter):
        registered = fetch_adapter(adapter)
        return str(registered.folder), adapter_base(registered.folder), registered
    folder = str(Path(adapter).resolve())
    return folder, adapter_base(folder), None


def show_progress(started: float, done: int, total: int, unit: str) -> None:
    """Done of all, rate and time left."""
    seconds = max(time.monotonic() - started, 1e-9)
    show_line(f"{done}/{total} {unit}, {done / seconds:.2f} {unit}/s, {seconds / done * (total - done):.0f} s left", done == total)


def show_line(line: str, last: bool) -> None:
    """Rewrite a line of progress in place; only on a terminal, where someone looks."""
    if sys.stderr.isatty():
        print(f"\r{line:<70}", end="\n" if last else "", file=sys.stderr, flush=True)


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's main and exit as the contract says. An InputError raised on a Ray worker counts as one here."""
    _prepare_environment()
    try:
        main()
    except (InputError, StoppedError) as error:
        cause: Any = error
        while getattr(cause, "cause", None) is not None:  # Ray wraps it once a process that it passed
            cause = cause.cause
        _exit(EXIT_BAD_INPUT if isinstance(cause, InputError) else EXIT_STOPPED, cause)
    except KeyboardInterrupt:
        _exit(EXIT_STOPPED, "stopped by the keyboard; run the same command again, with --resume where it has that option")
    sys.exit(0)


def connect_ray() -> dict[str, float]:
    """Join the cluster of $RAY_ADDRESS, or start a local Ray on loopback that asks for this process's token.

    Returns the resources of a local Ray; {} for a cluster, which may grow.
    """
    import ray
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return {}
    python_path = os.pathsep.join([str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False,
             logging_level=logging.ERROR, runtime_env={"env_vars": {"PYTHONPATH": python_path}})
    return ray.cluster_resources()


def _prepare_environment() -> None:
    """Before any library is imported: a token for a local Ray, which reads it on import, and quiet, since progress bars and
    advice of libraries would drown our own lines."""
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for name in ("alembic", "mlflow", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _exit(code: int, message: object) -> NoReturn:
    print(f"error: {message}" if code == EXIT_BAD_INPUT else f"stopped: {message}", file=sys.stderr)
    sys.exit(code)
