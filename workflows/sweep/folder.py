"""Owns a sweep's folder under results/: its settings and its data, how it is found again, how it ended. Loads
nothing heavy.

    results/NAME/sweep.json    settings and data digests, written before anything runs; --resume goes by it
    results/NAME/trials/       one record a trial        results/NAME/ray/     Ray Tune's own state and checkpoints
    results/NAME/best/         the best adapter, PEFT    results/NAME/summary.json     the end result
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.base.reference import resolve_base
from qlora.config import InputError
from qlora.data.examples import Example, examples_digest, load_examples
from qlora.data.prompts import load_prompt
from qlora.files import write_json
from tuning.space import Space, load_space


@dataclass(frozen=True)
class SweepFolder:
    """One sweep on disk, `space_file` being where its space was read from; `start`: the adapter that its trials go on from, and where
    that is, if there is one."""

    folder: Path
    space_file: str
    space: Space
    start: tuple[str, Path] | None = None

    @classmethod
    def planned(
        cls, folder: Path, space_file: str, overrides: list[str], continue_from: str | None = None
    ) -> "SweepFolder":
        """A sweep that has not started. Raises InputError for a bad space, a name that is taken, an adapter that doesn't fit."""
        start = None
        if continue_from:
            from workflows.sweep.starting_point import starting_point

            start = starting_point(continue_from)
        space = load_space(space_file, overrides, start.settings if start else None)
        if start and start.base != space.base_model.name:
            raise InputError(
                "--continue-from",
                f"{continue_from} belongs to the base {start.base}, not to {space.base_model.name}; "
                f"add --set base_model.name={start.base}",
            )
        results = cls(folder, space_file, space, (start.name, start.folder) if start else None)
        if results.summary() is not None:
            raise InputError(
                folder, "holds a finished sweep; choose another --name, or remove the folder to run it again"
            )
        if (folder / "sweep.json").exists():
            raise InputError(
                folder,
                f"holds an unfinished sweep; continue it with --resume {folder.name}, or choose another --name",
            )
        return results

    @classmethod
    def reopened(cls, folder: Path) -> "SweepFolder":
        """A sweep that was started before. Raises InputError if there is none."""
        try:
            content = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                "--resume",
                f"there is no sweep {folder.name!r} under {folder.parent.name}/; start it with --space",
            ) from None
        started_from = content.get("continue_from")
        return cls(
            folder,
            content["space_file"],
            Space.model_validate(content["space"]),
            (started_from, folder / "start") if started_from else None,
        )

    def check(self) -> None:
        """Raise InputError for a base, a prompt or data that can't be had, and for data that changed since the sweep started."""
        resolve_base(self.space.base_model.name)
        load_prompt(self.space.prompt)
        digests = self.digests()
        if (self.folder / "sweep.json").exists():
            before = json.loads((self.folder / "sweep.json").read_text(encoding="utf-8"))["digests"]
            for role, digest in digests.items():
                if before[role] != digest:
                    raise InputError(
                        getattr(self.space.data, role),
                        "changed since the sweep started; start a new sweep under another --name",
                    )

    def claim(self) -> None:
        """Write sweep.json: from here on the sweep exists and can be resumed."""
        if self.start and self.start[1] != self.folder / "start":
            shutil.copytree(self.start[1], self.folder / "start", dirs_exist_ok=True)
        write_json(
            self.folder / "sweep.json",
            {
                "sweep": self.folder.name,
                "space_file": self.space_file,
                "space": self.space.model_dump(mode="json"),
                "digests": self.digests(),
                "continue_from": self.start[0] if self.start else None,
            },
        )

    @property
    def model_name(self) -> str:
        """Of the registered model and the experiment: as the space says, else the space file's name."""
        return self.space.registered_model or Path(self.space_file).stem

    def summary(self) -> dict[str, Any] | None:
        """The content of summary.json; None while the sweep is not finished."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def closing_words(self) -> str:
        """What was found and where to look, for the end of the screen."""
        summary = self.summary()
        assert summary is not None
        best, champion = summary["best"], summary["champion"]
        return "\n".join(
            [
                f"best        trial {best['trial_id']}: public perplexity {best['public_perplexity']:.4f}, "
                f"zero-shot {summary['zero_shot']:.4f}",
                f"registered  {best['model_uri']}, {'now champion' if champion['is_champion'] else 'not champion'}: {champion['reason']}",
                f"adapter     {best['checkpoint']} (a PEFT folder)",
                f"report      results/{self.folder.name}/report.html, summary.json beside it",
                f"compare     make ui, then experiment {self.model_name!r}",
                f"generate    python ray_jobs/batch_infer.py --model models:/{self.model_name}@champion --input FILE --output FILE",
            ]
        )

    def examples(self, role: str) -> list[Example]:
        """Those of a role, train or public, that the sweep uses."""
        limit = getattr(self.space.data, f"{role}_examples")
        return load_examples(getattr(self.space.data, role), need_output=True)[:limit]

    def digests(self) -> dict[str, str]:
        """Of the examples, by role."""
        return {role: examples_digest(self.examples(role)) for role in ("train", "public")}
