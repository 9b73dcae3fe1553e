"""Owns checkpoints: a folder with the adapter in PEFT's layout, the optimizer's tensors and the position, a manifest last.

A folder without a manifest, or whose files differ from it, is no checkpoint: a kill at any moment leaves either the whole
or nothing. Only safetensors and JSON are read back.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.lora.peft_folder import AdapterContent
from qlora.training import Training

ADAPTER, OPTIMIZER, POSITION, MANIFEST = "adapter", "optimizer.safetensors", "position.json", "manifest.json"


class CheckpointError(ValueError):
    """A folder is not a whole checkpoint."""


@dataclass(frozen=True)
class CheckpointContent:
    """What a checkpoint is made of, in memory: to be written while the device does other work. It holds until the trial's next step."""

    adapter: AdapterContent
    optimizer: dict[str, Tensor]
    position: dict[str, Any]

    @classmethod
    def of(cls, training: Training) -> "CheckpointContent":
        """All that `load_checkpoint` needs to go on exactly."""
        tensors, position = training.state()
        return cls(
            training.bank.content(training.adapter),
            {name: tensor.cpu() for name, tensor in tensors.items()},
            position,
        )

    def write(self, folder: Path) -> None:
        """Write the checkpoint. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        self.adapter.write(folder / ADAPTER)
        save_file({name: tensor.contiguous() for name, tensor in self.optimizer.items()}, folder / OPTIMIZER)
        (folder / POSITION).write_text(json.dumps(self.position, indent=1), encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
        manifest = {str(path.relative_to(folder)): _digest(path) for path in files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def save_checkpoint(folder: Path, training: Training) -> None:
    """Write a training's checkpoint. Raises OSError."""
    CheckpointContent.of(training).write(folder)


def load_checkpoint(folder: Path, training: Training) -> None:
    """Bring a fresh Training with the same settings and data to where the checkpoint was.

    Raises CheckpointError for a folder that is not whole, ValueError for another run's checkpoint.
    """
    verify_checkpoint(folder)
    training.load_state(
        load_file(folder / OPTIMIZER), json.loads((folder / POSITION).read_text(encoding="utf-8"))
    )
    training.bank.load(training.adapter, folder / ADAPTER)


def verify_checkpoint(folder: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there, byte for byte."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable manifest: it was not finished") from error
    for name, digest in manifest.items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            raise CheckpointError(f"{folder}: {name} is missing or damaged")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
