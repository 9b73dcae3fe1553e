"""Owns that a prompt which fails in an engine costs no other, and what tells its fault from the engine's.

Prompts whose process dies are the matter of `attempts`.
"""

import os
import sys

import torch

from inference.engine import Engine
from qlora.config import first_line

_ANY_TOKEN = 0  # which every vocabulary has


def generate_each(engine: Engine, prompts: list[list[int]]) -> list[tuple[str, int, str]]:
    """Return (text, number of new tokens, error) of each prompt.

    If they fail together they are tried one by one, so that only what fails alone is lost. A GPU that was
    left unusable ends this process: its rows are then tried apart by others.
    """
    try:
        found = {index: (text, count, "") for index, text, count in engine.generate(prompts)}
        return [found[index] for index in range(len(prompts))]
    except Exception as error:
        _end_without_device()
        if len(prompts) == 1:
            return [("", 0, f"{type(error).__name__}: {first_line(error)}")]
        return [outcome for prompt in prompts for outcome in generate_each(engine, [prompt])]


def is_sound(engine: Engine) -> bool:
    """Tell whether an engine generates at all: if so, it is a prompt's fault that it failed."""
    return not generate_each(engine, [[_ANY_TOKEN]])[0][2]


def _end_without_device() -> None:
    """End this process if the GPU can't be used any more by it, as after an index out of range."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        print(first_line(error), file=sys.stderr, flush=True)
        os._exit(1)
