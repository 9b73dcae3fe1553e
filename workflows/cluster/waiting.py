"""Owns whether a Ray can place work at all, and the wait, with words, for the first node that has room."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

from qlora.config import InputError
from tuning.placement import nodes_for, options
from workflows.cluster.capacity import ACCELERATOR, Capacity
from workflows.session import StoppedError, go_on

_TRIALS = "resources_per_trial"
_SECONDS_BETWEEN_WORDS, _SECONDS_BETWEEN_LOOKS = 20.0, 1.0


def check_place(capacity: Capacity, shares: Mapping[str, float], key: str = _TRIALS) -> None:
    """Raise InputError if no node that is there or may come could hold what asks for `shares`.

    `key`: what to blame for it, if it is not the space.
    """
    if capacity.is_there(shares) or capacity.could_come(shares):
        return
    who = "a trial" if key == _TRIALS else "a step"
    for name, wanted in shares.items():
        one = {name: wanted}
        if capacity.is_there(one) or capacity.could_come(one):
            continue
        if name.startswith(ACCELERATOR):
            kind = name.removeprefix(ACCELERATOR)
            raise InputError(
                "accelerator_type", f"no node has, or may have, a {kind}; name another kind of GPU"
            )
        mend = _mend(name) if key == _TRIALS else "add a node with some"
        raise InputError(key, f"{who} asks for {wanted:g} {name}, but {capacity.describe(name)}; {mend}")
    asked = ", ".join(f"{wanted:g} {name}" for name, wanted in shares.items() if wanted)
    raise InputError(key, f"no node has, or may have, all that {who} asks for: {asked}")


def wait_for_first(
    answers: list[Any],
    shares: Mapping[str, float],
    timeout_seconds: float,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Wait, with words, until one of several tasks that ask for `shares` has come to its end.

    The tasks are what makes an autoscaler bring nodes. A Ray of this process's own has what there is, and
    needs no words. `look` is called again and again, and may add to the tasks. Raises StoppedError if none
    ends within so many seconds.
    """
    began = said = time.monotonic()
    while not ray.wait(answers, timeout=_SECONDS_BETWEEN_LOOKS, fetch_local=False)[0]:
        go_on()
        look()
        now, device = time.monotonic(), "GPU" if shares.get("GPU") else "CPU"
        what = f"a free {device}" if nodes_for(shares) else f"the first {device} node"
        if now - began > timeout_seconds:
            raise StoppedError(
                f"{what} has not come within {timeout_seconds:.0f} s; run the same command again"
            )
        if os.environ.get("RAY_ADDRESS") and now - said > _SECONDS_BETWEEN_WORDS:
            print(f"waiting for {what}, {now - began:.0f} s", flush=True)
            said = now


def wait_for_place(shares: Mapping[str, float], timeout_seconds: float) -> None:
    """Wait, with words, until there is a node that could hold what asks for `shares`.

    Raises StoppedError if none comes within so many seconds.
    """
    if not nodes_for(shares):
        wait_for_first([ray.remote(**options(shares))(_wish).remote()], shares, timeout_seconds)


def _wish() -> None:
    """Do nothing: that it is asked for makes an autoscaler bring a node."""


def _mend(name: str) -> str:
    mend = f"lower it with --set resources_per_trial.{name.lower()}=N"
    return f"{mend} --set trials_per_gpu=null" if name == "GPU" else mend
