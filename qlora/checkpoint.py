"""Owns checkpoints: a folder with the adapter in PEFT's layout, the optimizer's tensors and the position.

The last file is a manifest with the SHA-256 of every other. A folder without a manifest, or whose files
differ from it, is no checkpoint: so a kill at any moment leaves either the whole or nothing. Only safetensors
and JSON are read back, and neither can run code.

Refuses to know when a checkpoint is due and where it is kept.
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

ADAPTER = "adapter"
OPTIMIZER = "optimizer.safetensors"
POSITION = "position.json"
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A folder that is not a whole checkpoint."""


@dataclass(frozen=True)
class CheckpointContent:
    """A checkpoint in memory, to be written while the device does other work.

    On a CPU its tensors are the trial's own, so it holds only until the trial's next step.
    """

    adapter: AdapterContent
    optimizer: dict[str, Tensor]
    position: dict[str, Any]

    @classmethod
    def of(cls, training: Training) -> "CheckpointContent":
        """Collect all that `load_checkpoint` needs to go on exactly."""
        tensors, position = training.state()
        return cls(
            adapter=training.bank.content(training.adapter),
            optimizer={name: tensor.cpu() for name, tensor in tensors.items()},
            position=position,
        )

    def write(self, folder: Path) -> None:
        """Write the checkpoint. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        self.adapter.write(folder / ADAPTER)
        tensors = {name: tensor.contiguous() for name, tensor in self.optimizer.items()}
        save_file(tensors, folder / OPTIMIZER)
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
    tensors = load_file(folder / OPTIMIZER)
    position = json.loads((folder / POSITION).read_text(encoding="utf-8"))
    training.load_state(tensors, position)
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
    """Return the SHA-256 (hexadecimal) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
