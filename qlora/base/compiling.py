"""Owns the compiling of Triton's kernels by several threads at once, before a piece of work launches them.

Triton compiles a kernel when it is launched for the first time, and so one behind the other. What is compiled
is kept in files; on a machine that has them, to look for them takes as long as a launch of each.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

try:
    import triton
except ImportError:  # it comes with CUDA builds of torch
    triton = None

_MOST_THREADS = 16


def compile_together(work: Callable[[], Any]) -> int:
    """Compile the kernels that a piece of work launches, several at once; they are not launched here.

    The work is done without them, so that what it computes means nothing; it must be such that this does no
    harm. A kernel that can't be compiled is left alone: who launches it then is told why. Returns how many
    were compiled anew, and not found in files.
    """
    if triton is None:
        return 0
    anew = list[str]()
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
        mode = triton.AsyncCompileMode(threads, ignore_errors=True)
        # A backward of this very thread: the mode is of one thread alone.
        with _not_launched(anew), mode, torch.autograd.set_multithreading_enabled(False):
            work()
    return len(anew)


@contextmanager
def _not_launched(anew: list[str]) -> Iterator[None]:
    """Have each kernel, within, compiled and no more, as its `warmup` does; note what was compiled anew."""
    launch, listener = triton.JITFunction.run, triton.knobs.compilation.listener

    def compiled(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        return launch(kernel, *args, warmup=True, **kwargs)

    def note(*, src: Any, cache_hit: bool, **kwargs: Any) -> None:
        if not cache_hit:
            anew.append(src.name)
        if listener is not None:
            listener(src=src, cache_hit=cache_hit, **kwargs)

    triton.JITFunction.run, triton.knobs.compilation.listener = compiled, note
    try:
        yield
    finally:
        triton.JITFunction.run, triton.knobs.compilation.listener = launch, listener
