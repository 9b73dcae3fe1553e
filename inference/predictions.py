"""Owns predictions on disk: rows as they come, kept so that a stopped job can go on; then one ordered JSON file, atomically."""

import hashlib
import json
from pathlib import Path
from typing import Any, TextIO

from qlora.config import InputError
from qlora.data import Example
from qlora.files import write_json, write_text


class Journal:
    """The finished rows of a job, one JSON line each, beside the output. Its first line names the job's settings."""

    def __init__(self, output: Path, settings: dict[str, Any], *, resume: bool):
        """Open the journal of `output`; with `resume` its rows are kept, else it starts afresh.

        Raises InputError if it belongs to a job with other settings.
        """
        self.path = output.with_name(f".{output.name}.journal")
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
        self.texts: dict[int, str] = {}
        output.parent.mkdir(parents=True, exist_ok=True)
        if resume and self.path.exists():
            self._read(digest)
        self._file = self._rewrite(digest)

    def append(self, index: int, text: str) -> None:
        """Keep the text of one input row."""
        self.texts[index] = text
        self._file.write(json.dumps([index, text], ensure_ascii=False) + "\n")
        self._file.flush()

    def remove(self) -> None:
        """Close and delete the journal: its job is done."""
        self._file.close()
        self.path.unlink()

    def _read(self, digest: str) -> None:
        first, *lines = self.path.read_text(encoding="utf-8").split("\n")
        if first != json.dumps(digest):
            raise InputError(self.path, "belongs to a job with another model, prompt, input or settings; "
                             "run without --resume to start afresh")
        for line in lines:
            if line.endswith("]"):
                index, text = json.loads(line)
                self.texts[index] = text

    def _rewrite(self, digest: str) -> TextIO:
        rows = [json.dumps(digest), *(json.dumps([index, text], ensure_ascii=False) for index, text in self.texts.items())]
        write_text(self.path, "\n".join(rows) + "\n")
        return open(self.path, "a", encoding="utf-8")


def write_predictions(path: Path, examples: list[Example], texts: dict[int, str]) -> None:
    """Write [{"id", "output"}] in input order, replacing the file in one move."""
    write_json(path, [{"id": example.id, "output": texts[index]} for index, example in enumerate(examples)])
