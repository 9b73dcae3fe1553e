"""Owns one batch job: an input file -> an ordered output file, with what failed and what it was made of beside it.

Rows are kept in a work folder as they come; a job that was stopped goes on from there. Refuses to know the registry.
"""

import fcntl
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.pipeline import Pool, Work, generate_rows
from inference.predictions import Journal, beside, work_folder, write_predictions
from inference.rows import RowStore, store_rows
from inference.scores import Scores
from qlora.config import InputError
from qlora.files import write_json
from qlora.lora.peft_folder import AdapterFiles
from qlora.provenance import package_versions


@dataclass(frozen=True)
class JobResult:
    """What a job did: all rows, those generated now, those that failed, seconds, the engine, and scores if the input has outputs."""

    num_rows: int
    num_generated: int
    num_failed: int
    seconds: float
    engine: str | None
    scores: dict[str, float] | None


@dataclass(frozen=True)
class Progress:
    """Where a job stands: rows and tokens done now, rows to do now, seconds since an engine was ready."""

    num_done: int
    num_tokens: int
    num_rows: int
    seconds: float

    def __str__(self) -> str:
        rate, left = (
            self.num_done / self.seconds,
            self.seconds / max(self.num_done, 1) * (self.num_rows - self.num_done),
        )
        return (
            f"{self.num_done}/{self.num_rows} rows, {rate:.2f} rows/s, {self.num_tokens / self.seconds:.0f} tokens/s, "
            f"{left:.0f} s left"
        )


@contextmanager
def open_job(source: Path, output: Path) -> Iterator[RowStore]:
    """The checked rows of an input, held for one job on this output; at a clean end the work folder stays for `run_job`.

    Raises InputError for bad rows, and if another job is at work on the same output.
    """
    if output.is_dir():
        raise InputError(output, "is a folder; name a file")
    folder = work_folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                output, "is being written by another job; wait for it or name another file"
            ) from None
        try:
            yield store_rows(source, folder)
        except InputError:
            if not (folder / "journal.jsonl").exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise


def run_job(
    work: Work,
    rows: RowStore,
    output: Path,
    facts: dict[str, Any],
    plan: Callable[[], Pool],
    *,
    resume: bool,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> JobResult:
    """Generate what is missing and write the output, PATH.meta.json and, if rows failed, PATH.errors.json.

    `facts` name the model for PATH.meta.json and for `resume`, which refuses the rows of a job with other facts, prompt,
    settings or input. `plan` is called when there is work: it connects Ray.
    """
    settings = {
        "model": facts,
        "prompt": work.prompt.digest,
        "generation settings": work.decoding.model_dump(mode="json"),
        "input": rows.digest,
        "longest prompt": work.max_prompt_tokens,
    }
    folder = work_folder(output)
    journal = Journal(folder, settings, len(rows), resume=resume)
    missing, started = journal.missing(), time.monotonic()
    first_row_seconds, ready = None, float("inf")
    num_tokens, workers, engines = 0, 0, set[str]()
    if missing:
        pool = plan()
        workers = pool.num_workers
        for report in generate_rows(work, rows, missing, pool):
            if first_row_seconds is None:
                first_row_seconds = round(time.monotonic() - started, 3)
            ready = min(ready, time.monotonic() - report.seconds)
            journal.append(report.results)
            num_tokens += report.num_tokens
            engines.add(report.engine)
            num_done = journal.num_done - len(rows) + len(missing)
            progress(Progress(num_done, num_tokens, len(missing), max(1e-9, time.monotonic() - ready)))
    seconds, generating = time.monotonic() - started, max(0.0, time.monotonic() - ready)
    engine, scores = "; ".join(sorted(engines)) or None, Scores()
    errors = write_predictions(
        output,
        rows,
        journal,
        lambda example, text: scores.add(text, example.output) if example.output else None,
    )
    summary = scores.summary() if scores.count else None
    write_json(
        beside(output, "meta"),
        {
            **facts,
            "prompt": work.prompt.name,
            "prompt_digest": settings["prompt"],
            "shots": len(work.prompt.shots),
            "generation": work.decoding.model_dump(mode="json"),
            "input_digest": rows.digest,
            "rows": len(rows),
            "rows_generated": len(missing),
            "rows_failed": len(errors),
            "workers": workers,
            "engine": engine,
            "seconds": round(seconds, 3),
            "rows_per_second": round(len(missing) / max(seconds, 1e-9), 3),
            "tokens": num_tokens,
            "seconds_generating": round(generating, 3),
            "rows_per_second_generating": round(len(missing) / max(generating, 1e-9), 3),
            "seconds_to_first_row": first_row_seconds,
            "scores": summary,
            "versions": package_versions(),
        },
    )
    journal.close()
    shutil.rmtree(folder)
    return JobResult(len(rows), len(missing), len(errors), seconds, engine, summary)


def model_facts(work: Work, model: str | None, revision: str | None) -> dict[str, Any]:
    """Return what identifies the model of a job: its URI in the registry, its base and its adapter.

    The adapter is told by its content, a local base by its files' sizes and times of change.
    """
    base, adapter = work.served.base, work.served.adapter
    files = sorted(Path(base.name).glob("*.safetensors")) if Path(base.name).is_dir() else []
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {
        "model_uri": model,
        "base": base.model_dump(mode="json"),
        "base_revision": revision,
        "base_files": hashlib.sha256(repr(stamps).encode()).hexdigest() if files else None,
        "adapter_digest": None if adapter is None else AdapterFiles.read(adapter).digest,
    }
