"""Owns one batch job: from an input file to an ordered output file.

Beside the output it writes what failed (PATH.errors.json) and what the output was made of (PATH.meta.json).
Rows are kept in a work folder as they are done, and a job that was stopped goes on from there. The folder is
removed last, in one move: killed anywhere before, the job is finished from it, and comes to the same files.

Refuses to know the registry.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.books import Books, Progress
from inference.pipeline import Pool, Work, generate_rows, gpus_there
from inference.predictions import JOURNAL, Journal, beside, work_folder, write_predictions
from inference.rows import RowStore, store_rows
from inference.scores import Scores
from qlora.config import InputError
from qlora.cost import Costs
from qlora.data.row_shapes import AS_FOUND, Example, RowShape
from qlora.data.sources import Places
from qlora.failpoints import durable
from qlora.files import read_json, remove_unfinished, write_json, write_text
from qlora.lora.peft_folder import AdapterFiles
from qlora.provenance import package_versions

_HELD = "held.json"  # what a job's GPUs have cost, over all of its runs


@dataclass(frozen=True)
class JobResult:
    """The result of a job.

    num_generated: rows that this run generated, which a resumed job has fewer of. scores: chrF, BLEU and
    exact matches, if the input has outputs to compare with. costs: of all runs, if they had GPUs.
    """

    num_rows: int
    num_generated: int
    num_failed: int
    seconds: float
    engine: str | None
    scores: dict[str, float] | None
    costs: Costs | None = None


@contextmanager
def open_job(source: Places, output: Path, shape: RowShape = AS_FOUND) -> Iterator[RowStore]:
    """Provide the checked rows of an input, within, to one job on this output.

    The work folder stays, for `run_job` to remove or a later job to resume. Raises InputError for bad rows,
    if another job is at work on the same output, and if something else is where the job's files belong.
    """
    folder = work_folder(output)
    _check_places(output, folder)
    with _lock(output, folder):
        _remove_unfinished(output)
        try:
            yield store_rows(source, folder, shape)
        except InputError:
            if not (folder / JOURNAL).exists():
                _remove(folder, output)
            raise


def _check_places(output: Path, folder: Path) -> None:
    """Raise InputError for a folder where a file of the job belongs, and for a folder that can't be."""
    for file in (output, beside(output, "errors"), beside(output, "meta")):
        if file.is_dir():
            raise InputError(file, "is a folder; name a file" if file == output else "is a folder; remove it")
    for name in ("lock", "rows.jsonl", JOURNAL):
        if (folder / name).is_dir():
            raise InputError(folder, f"holds a folder {name}, which no job has left there; remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(folder, f"can't be a folder for the job's rows: {error.strerror}") from None


@contextmanager
def _lock(output: Path, folder: Path) -> Iterator[None]:
    """Hold the lock of an output, within. Raises InputError if another job holds it, or is just done."""
    problem = "is being written by another job; wait for it or name another file"
    path = folder / "lock"
    try:
        lock = open(path, "w")  # noqa: SIM115
    except FileNotFoundError:
        raise InputError(output, problem) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(output, problem) from None
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(lock.fileno())):
            raise InputError(output, problem)  # its folder was removed meanwhile
        yield


def _remove_unfinished(output: Path) -> None:
    """Remove what killed jobs on this output left half written or half removed."""
    remove_unfinished(work_folder(output))
    names = "|".join(
        re.escape(path.name) for path in (output, beside(output, "errors"), beside(output, "meta"))
    )
    for path in output.parent.iterdir():
        if re.fullmatch(rf"\.({names})\.\d+\.part", path.name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _remove(folder: Path, output: Path) -> None:
    """Remove the work folder of an output in one move: a part of it would be no job to go on from."""
    going = output.with_name(f".{output.name}.{os.getpid()}.part")
    with durable("batch work folder moved"):
        folder.rename(going)
    with durable("batch work folder removed"):
        shutil.rmtree(going)


def run_job(
    work: Work,
    rows: RowStore,
    output: Path,
    facts: dict[str, Any],
    plan: Callable[[], Pool],
    *,
    resume: bool,
    progress: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = print,
    record: Callable[[str, JobResult], None] = lambda job_id, result: None,
    price_per_gpu_hour: float | None = None,
) -> JobResult:
    """Generate what is missing and write the output, PATH.meta.json and, if rows failed, PATH.errors.json.

    `facts` identify the model, for PATH.meta.json and for `resume`. `plan` connects Ray, and is called only
    if there is work. `progress` is called after each batch, `note` with a line for people. `record` is called
    with the job's id and result when all files are written; what it raises leaves the job to be resumed.
    `price_per_gpu_hour`: see qlora.cost.

    Raises InputError if rows that are to be resumed belong to a job with other facts, prompt, settings or
    input, or to one that can't be told, and if the model can't be loaded; EnginesDiedError if processes die
    again and again, without a finished row.
    """
    folder = work_folder(output)
    if resume and (done := _done_before(work, rows, output, facts)) is not None:
        note(
            f"{output} is whole already, of the same input, model, prompt and settings: nothing is to be done"
        )
        _remove(folder, output)
        return done
    job_id = _job_id(folder, resume)
    journal = Journal(folder, _settings(work, rows, facts), len(rows), resume=resume)
    if journal.damage:
        note(journal.damage)
    missing = journal.missing()
    books = Books(folder / _HELD, len(missing), price_per_gpu_hour, resume=resume)
    if missing:
        _generate(work, rows, missing, journal, books, plan(), progress)
    account = books.close()
    engine = "; ".join(sorted(journal.engines)) or None
    figures = {"engine": engine, **account.figures}
    num_failed, scores = _write(work, rows, journal, output, facts, figures)
    journal.close()
    result = JobResult(len(rows), len(missing), num_failed, account.seconds, engine, scores, account.costs)
    record(job_id, result)
    _remove(folder, output)
    return result


def _settings(work: Work, rows: RowStore, facts: dict[str, Any]) -> dict[str, Any]:
    """Return what rows that are to be resumed must have been generated with."""
    return {
        "model": facts,
        "prompt": work.prompt.digest,
        "generation settings": work.decoding.model_dump(mode="json"),
        "input": rows.digest,
        "longest prompt": work.max_prompt_tokens,
    }


def _generate(
    work: Work,
    rows: RowStore,
    missing: Sequence[int],
    journal: Journal,
    books: Books,
    pool: Pool,
    progress: Callable[[Progress], None],
) -> None:
    """Generate for the missing rows, and keep each batch as it is done."""
    with books.engines_held(pool.num_workers, lambda: gpus_there(pool)):
        for report in generate_rows(work, rows, missing, pool):
            journal.append(report.results, report.engine)
            num_done = journal.num_done - len(rows) + len(missing)
            progress(books.add(num_done, report.num_tokens, report.seconds))


def _write(
    work: Work, rows: RowStore, journal: Journal, output: Path, facts: dict[str, Any], figures: dict[str, Any]
) -> tuple[int, dict[str, float] | None]:
    """Write the output and PATH.meta.json; return how many rows failed, and the scores, if there are any."""
    scores = Scores()

    def score(example: Example, text: str) -> None:
        if example.output:
            scores.add(text, example.output)

    errors = write_predictions(output, rows, journal, score)
    summary = scores.summary() if scores.count else None
    meta = {
        **_made_of(work, rows, facts),
        "prompt": work.prompt.name,
        "shots": len(work.prompt.shots),
        "rows_failed": len(errors),
        **figures,
        "scores": summary,
        "output_digest": _digest(output),
        "versions": package_versions(),
    }
    write_json(beside(output, "meta"), meta, "batch meta")
    return len(errors), summary


def _made_of(work: Work, rows: RowStore, facts: dict[str, Any]) -> dict[str, Any]:
    """Return what PATH.meta.json says of a job before it is done."""
    return {
        **facts,
        "prompt_digest": work.prompt.digest,
        "generation": work.decoding.model_dump(mode="json"),
        "input_digest": rows.digest,
        "max_prompt_tokens": work.max_prompt_tokens,
        "rows": len(rows),
    }


def _done_before(work: Work, rows: RowStore, output: Path, facts: dict[str, Any]) -> JobResult | None:
    """Return the result of a job that is done, if it is this very one and its output stands as it was."""
    if (work_folder(output) / JOURNAL).exists() or not output.is_file():
        return None
    try:
        meta = read_json(beside(output, "meta"), "")
    except (FileNotFoundError, InputError):
        return None
    made_of = json.loads(json.dumps(_made_of(work, rows, facts)))
    if any(meta.get(key, value) != value for key, value in made_of.items()):
        return None
    if meta.get("output_digest") != _digest(output):
        return None
    return JobResult(len(rows), 0, meta.get("rows_failed", 0), 0.0, meta.get("engine"), meta.get("scores"))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _job_id(folder: Path, resume: bool) -> str:
    """Return the id that a job keeps through all of its runs."""
    path = folder / "job_id"
    kept = path.read_bytes() if resume and path.is_file() else b""
    if not re.fullmatch(rb"[0-9a-f]{32}", kept):  # new, or damaged
        write_text(path, secrets.token_hex(16), "batch job id")
    return path.read_text(encoding="utf-8")


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
