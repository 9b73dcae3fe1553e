"""Owns one batch job: from an input file to an ordered output file.

Beside the output it writes what failed (PATH.errors.json) and what the output was made of (PATH.meta.json).
Rows are kept in a work folder as they are done, and a job that was stopped goes on from there.

Refuses to know the registry.
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
from qlora.data.examples import Example
from qlora.files import write_json
from qlora.lora.peft_folder import AdapterFiles
from qlora.provenance import package_versions


@dataclass(frozen=True)
class JobResult:
    """The result of a job.

    num_generated: rows that this run generated, which a resumed job has fewer of. scores: chrF, BLEU and
    exact matches, if the input has outputs to compare with.
    """

    num_rows: int
    num_generated: int
    num_failed: int
    seconds: float
    engine: str | None
    scores: dict[str, float] | None


@dataclass(frozen=True)
class Progress:
    """The progress of a job's present run.

    num_done, num_tokens: rows and tokens that this run generated so far. num_rows: rows that it has to
    generate. seconds: time since an engine was ready.
    """

    num_done: int
    num_tokens: int
    num_rows: int
    seconds: float

    def __str__(self) -> str:
        rows_per_second = self.num_done / self.seconds
        tokens_per_second = self.num_tokens / self.seconds
        seconds_left = self.seconds / max(self.num_done, 1) * (self.num_rows - self.num_done)
        return (
            f"{self.num_done}/{self.num_rows} rows, {rows_per_second:.2f} rows/s, "
            f"{tokens_per_second:.0f} tokens/s, {seconds_left:.0f} s left"
        )


@contextmanager
def open_job(source: Path, output: Path) -> Iterator[RowStore]:
    """Provide the checked rows of an input, within, to one job on this output.

    The work folder stays, for `run_job` to remove or a later job to resume. Raises InputError for bad rows,
    and if another job is at work on the same output.
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

    `facts` identify the model, for PATH.meta.json and for `resume`. `plan` connects Ray, and is called only
    if there is work. `progress` is called after each batch. Raises InputError if rows that are to be resumed
    belong to a job with other facts, prompt, settings or input, and if the model can't be loaded.
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
    missing = journal.missing()
    started = time.monotonic()
    ready = float("inf")  # when the first engine began to generate
    first_row_seconds = None
    num_tokens = 0
    workers = 0
    engines: set[str] = set()
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
            present = Progress(
                num_done=journal.num_done - len(rows) + len(missing),
                num_tokens=num_tokens,
                num_rows=len(missing),
                seconds=max(1e-9, time.monotonic() - ready),
            )
            progress(present)
    seconds = time.monotonic() - started
    generating = max(0.0, time.monotonic() - ready)
    engine = "; ".join(sorted(engines)) or None
    scores = Scores()

    def score(example: Example, text: str) -> None:
        if example.output:
            scores.add(text, example.output)

    errors = write_predictions(output, rows, journal, score)
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
    return JobResult(
        num_rows=len(rows),
        num_generated=len(missing),
        num_failed=len(errors),
        seconds=seconds,
        engine=engine,
        scores=summary,
    )


def model_facts(work: Work, model: str | None, revision: str | None) -> dict[str, Any]:
    """Return what identifies the model of a job: its URI in the registry, its base and its adapter.

    The adapter is identified by its content, a local base by its files' sizes and times of change.
    """
    base = work.served.base
    adapter = work.served.adapter
    files = sorted(Path(base.name).glob("*.safetensors")) if Path(base.name).is_dir() else []
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {
        "model_uri": model,
        "base": base.model_dump(mode="json"),
        "base_revision": revision,
        "base_files": hashlib.sha256(repr(stamps).encode()).hexdigest() if files else None,
        "adapter_digest": None if adapter is None else AdapterFiles.read(adapter).digest,
    }
