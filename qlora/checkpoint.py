"""Owns checkpoints: a folder with the adapter in PEFT's layout, the optimizer's tensors and the position.

A manifest, written last, tells whether the folder is whole (qlora.checkpoint_files). Only safetensors and
JSON are read back, and neither can run code.

Refuses to know when a checkpoint is due and where it is kept.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.base.device import hold
from qlora.checkpoint_files import (
    ADAPTER,
    MANIFEST,
    OPTIMIZER,
    POSITION,
    CheckpointError,
    verify_checkpoint,
    write_manifest,
)
from qlora.lora.peft_folder import AdapterContent
from qlora.training import Training

__all__ = [
    "CheckpointContent",
    "CheckpointError",
    "load_checkpoint",
    "save_checkpoint",
    "start_from",
    "verify_checkpoint",
]
_START = {"step": 0, "is_start": True}  # the position of a run that begins with another's adapter


@dataclass(frozen=True)
class CheckpointContent:
    """A checkpoint in memory, to be written while its run goes on."""

    adapter: AdapterContent
    optimizer: dict[str, Tensor]
    position: dict[str, Any]

    @classmethod
    def of(cls, training: Training) -> "CheckpointContent":
        """Collect all that `load_checkpoint` needs to go on exactly."""
        return cls.held(training)()

    @classmethod
    def held(cls, training: Training) -> "Callable[[], CheckpointContent]":
        """Hold what a run is now; returns what collects it, in any thread, while the run goes on."""
        tensors, position = training.state()
        bring = hold([training.adapter.weights, *tensors.values()])

        def collect() -> CheckpointContent:
            weights, *others = bring()
            content = training.bank.content(training.adapter, weights)
            return cls(content, dict(zip(tensors, others, strict=True)), position)

        return collect

    def write(self, folder: Path, notes: Mapping[str, str] | None = None) -> None:
        """Write the checkpoint, with further text files by their names. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        self.adapter.write(folder / ADAPTER)
        tensors = {name: tensor.contiguous() for name, tensor in self.optimizer.items()}
        save_file(tensors, folder / OPTIMIZER)
        (folder / POSITION).write_text(json.dumps(self.position, indent=1), encoding="utf-8")
        for name, text in (notes or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        write_manifest(folder)


def save_checkpoint(folder: Path, training: Training) -> None:
    """Write a training's checkpoint. Raises OSError."""
    CheckpointContent.of(training).write(folder)


def start_from(folder: Path, target: Path) -> None:
    """Write the checkpoint of a run that begins with the adapter of another run's checkpoint.

    Raises CheckpointError if that is not whole, OSError.
    """
    verify_checkpoint(folder)
    shutil.copytree(folder / ADAPTER, target / ADAPTER)
    save_file({}, target / OPTIMIZER)
    (target / POSITION).write_text(json.dumps(_START), encoding="utf-8")
    write_manifest(target)


def load_checkpoint(folder: Path, training: Training) -> None:
    """Bring a fresh Training with the same settings and data to where the checkpoint was.

    Raises CheckpointError for a folder that is not whole, ValueError for another run's checkpoint.
    """
    verify_checkpoint(folder)
    tensors = load_file(folder / OPTIMIZER)
    position = json.loads((folder / POSITION).read_text(encoding="utf-8"))
    if position != _START:
        training.load_state(tensors, position)
    training.bank.load(training.adapter, folder / ADAPTER)
