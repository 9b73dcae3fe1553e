"""Owns how transformers loads a base's config, tokenizer and weights: quietly, and failing in one line.

Safetensors only, no remote code. Refuses to know what is loaded.
"""

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from qlora.base.reference import BaseReference
from qlora.config import InputError, first_line

_NO_COMPILER = "TORCHDYNAMO_DISABLE"


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Have transformers show no progress bar, within: nothing is loaded."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _quiet_report() -> Iterator[None]:
    """Keep what transformers says of its loading off the screen, within; what matters is checked."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def load_bitsandbytes() -> None:
    """Import bitsandbytes (0.50) without torch's compiler.

    On import it hands four functions to torch.compile, for what it has no kernels for. That alone loads 540
    modules: a second of CPU time, and more from a cold disk. They compute the same without it.
    """
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        importlib.import_module("bitsandbytes")
    finally:
        if before is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = before


def from_pretrained(auto_class: Any, name: str, reference: BaseReference, **options: Any) -> Any:
    """Load with one of transformers' Auto classes. Raises InputError, naming the base, if that fails."""
    try:
        with _quiet_report():
            return auto_class.from_pretrained(
                reference.location,
                revision=reference.revision,
                trust_remote_code=False,
                local_files_only=reference.kind != "hub",
                **options,
            )
    except StrictDataclassError as error:
        raise InputError(name, f"config.json is no good: {first_line(error.__cause__ or error)}") from error
    except (AttributeError, TypeError) as error:  # of a value that is of another type than it has to be
        if auto_class is not AutoConfig:
            raise
        raise InputError(name, f"config.json is no good: {first_line(error)}") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(name, f"can't be loaded: {first_line(error)}") from error
