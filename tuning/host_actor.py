"""Owns a host's process: what it is asked before it has a base, and that what fails there reaches who asks.

Loads nothing heavy before it is made. Refuses to know how hosts are found (tuning.host_directory).
"""

import importlib
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from qlora.config import first_line
from tuning.device import Device, this_device

if TYPE_CHECKING:
    from qlora.data.prompts import EncodedExample
    from qlora.lora.peft_folder import AdapterFiles
    from tuning.host import Host
    from tuning.soup import Finalist


_OF_A_FUNCTION = "install there what the objective's function needs"


class UnfitNodeError(RuntimeError):
    """A node that can't do its part, whichever trial comes."""


def _received(reference: Any, mend: str) -> Any:
    """Return what the driver sent. Raises UnfitNodeError, with a mend, if a module is missing here."""
    try:
        return ray.get(reference)
    except ray.exceptions.RaySystemError as error:  # what Ray makes of an error while it unpickles
        raise UnfitNodeError(
            f"a node can't read what the sweep works on: {first_line(error)}; {mend}"
        ) from error


class HostActor:
    """A tuning.host.Host in a process of its own.

    The heavy libraries load there at once, and the base once there is a plan. `device`: a GPU's number or
    "cpu". `orders`: see `begin`, none before there is a plan.
    """

    def __init__(self, device: str, num_threads: int, orders: Sequence[Any] = ()):
        # Ray's books give it none
        os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device
        self._num_threads, self._begun = num_threads, threading.Event()
        self._error: Exception | None = None
        if orders:
            self.begin(orders)
        else:
            importlib.import_module("tuning.host")

    def device(self) -> Device:
        """Measure the device that there is to plan for, before `begin`."""
        import torch

        torch.set_num_threads(self._num_threads)
        return replace(this_device(), num_cpus=self._num_threads)

    def begin(self, orders: Sequence[Any]) -> None:
        """Load the base; what is asked of the host waits for it. `orders`: see `Hosts`.

        The node is asked first, before there is need of any library that it may lack.
        """
        try:
            unfit, data = orders
            if problem := _received(unfit, "give it this project's code and its packages")():
                raise UnfitNodeError(": ".join(problem))
            from tuning.host import Host

            self._host = Host(_received(data, _OF_A_FUNCTION), self._num_threads)
        # raised to whoever calls: an actor that fails to start would only say that it died
        except Exception as error:
            self._error = error
        self._begun.set()

    def is_fit(self) -> bool:
        """Tell whether the host can do its part, once that is known."""
        self._begun.wait()
        return self._error is None

    def _has_begun(self) -> bool:
        return self._begun.is_set() and self._error is None

    def _found(self) -> "Host":
        self._begun.wait()
        if self._error is not None:
            raise self._error
        return self._host

    def zero_shot(self) -> dict[str, list[float]]:
        """See Host."""
        return self._found().zero_shot()

    def zero_shot_values(self) -> dict[str, float]:
        """See Host."""
        return self._found().zero_shot_values()

    def evaluation_seconds(self, examples: Sequence["EncodedExample"]) -> float:
        """See Host."""
        return self._found().evaluation_seconds(examples)

    def attach(
        self, trial_id: str, holder: str, config: dict[str, Any], checkpoint: str | None, notes: list[str]
    ) -> list[int]:
        """See Host."""
        return self._found().attach(trial_id, holder, config, checkpoint, notes)

    def advance(self, trial_id: str, step: int, folder: str) -> dict[str, Any]:
        """See Host. For a trial that would fail again, `diverged` or `unjudged` says why, and no more."""
        from qlora.training import DivergedError
        from tuning.objective import UnjudgedError

        try:
            return self._found().advance(trial_id, step, folder)
        except DivergedError as error:
            return {"diverged": str(error)}
        except UnjudgedError as error:
            return {"unjudged": str(error)}

    def soup(self, storage_uri: str, found: Sequence["Finalist"], most: int) -> Any:
        """See Host."""
        from tuning.checkpoints import Storage

        return self._found().soup(Storage.at(storage_uri), found, most)

    def measure(
        self, requests: Sequence[tuple["AdapterFiles", Sequence["EncodedExample"]]]
    ) -> list[list[float]]:
        """See Host."""
        return self._found().measure(requests)

    def end(self, trial_id: str) -> None:
        """See Host; a host that has not begun is told again."""
        if self._has_begun():
            self._host.end(trial_id)

    def set_aside(self, trial_id: str, storage_uri: str) -> None:
        """See Host; a host that has not begun has no seats."""
        from tuning.checkpoints import Storage

        if self._has_begun():
            self._host.set_aside(trial_id, Storage.at(storage_uri))

    def stop(self, storage_uri: str) -> int:
        """See Host; a host that has not begun has nothing to keep."""
        from tuning.checkpoints import Storage

        return self._host.stop(Storage.at(storage_uri)) if self._has_begun() else 0

    def detach(self, trial_id: str, holder: str | None = None) -> None:
        """See Host."""
        self._found().detach(trial_id, holder)

    def seconds(self) -> dict[str, float]:
        """See Host; a host that has not begun has done nothing."""
        return self._found().seconds() if self._has_begun() else {}

    def notes(self) -> list[str]:
        """See Host; a host that has not begun has nothing to say."""
        return self._found().notes() if self._has_begun() else []

    def process_id(self) -> int:
        """Return the host's process id."""
        return os.getpid()
