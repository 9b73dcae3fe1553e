"""Owns the compiling of Triton's kernels by several threads at once, before a piece of work launches them.

Triton compiles a kernel when it is launched for the first time, and so one behind the other. What is compiled
is kept in files; on a machine that has them, to look for them takes as long as a launch of each.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from qlora.config import first_line

try:
    import triton
except ImportError:  # it comes with CUDA builds of torch
    triton = None

_log = logging.getLogger(__name__)
_MOST_THREADS = 16
_are_known = [False]  # those that were looked for last were all found in files


def compile_unless_known(work: Callable[[], Any]) -> None:
    """Do as `compile_together`, unless kernels were found in files before, and none was missing there.

    Work that fails without its kernels is left to be done with them. Raises torch.cuda.OutOfMemoryError.
    """
    if _are_known[0]:
        return
    try:
        num_compiled, num_found = compile_together(work)
        _are_known[0] = num_found > 0 and num_compiled == 0
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        _log.warning("kernels are compiled one by one: %s", first_line(error))
        _are_known[0] = True


def compile_together(work: Callable[[], Any]) -> tuple[int, int]:
    """Compile the kernels that a piece of work launches, several at once; they are not launched here.

    The work is done without them, so that what it computes means nothing; it must be such that this does no
    harm. A kernel that can't be compiled is left alone: who launches it then is told why. Returns how many
    were compiled and how many were found in files; those that this process had already are neither.
    """
    if triton is None:
        return 0, 0
    found_in_files = list[bool]()
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
        mode = triton.AsyncCompileMode(threads, ignore_errors=True)
        # A backward of this very thread: the mode is of one thread alone.
        with _not_launched(found_in_files), mode, torch.autograd.set_multithreading_enabled(False):
            work()
    return found_in_files.count(False), found_in_files.count(True)


@contextmanager
def _not_launched(found_in_files: list[bool]) -> Iterator[None]:
    """Have this thread's kernels, within, compiled and no more; note whether they were in files."""
    launch, listener = triton.JITFunction.run, triton.knobs.compilation.listener
    thread = threading.get_ident()

    def compiled(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        is_here = threading.get_ident() == thread
        return launch(kernel, *args, warmup=warmup or is_here, **kwargs)

    def note(*, cache_hit: bool, **kwargs: Any) -> None:
        found_in_files.append(cache_hit)
        if listener is not None:
            listener(cache_hit=cache_hit, **kwargs)

    triton.JITFunction.run, triton.knobs.compilation.listener = compiled, note
    try:
        yield
    finally:
        triton.JITFunction.run, triton.knobs.compilation.listener = launch, listener
