"""Owns the last words of a batch job: on the screen, and in MLflow if a registered model made the outputs."""

from inference.job import JobResult
from inference.predictions import beside
from qlora.config import DecodingSettings
from tracking.registry import RegisteredAdapter, note_use
from workflows.results import Output


def closing_words(result: JobResult, output: str) -> str:
    """Name the engine, scores if there are any, and how many rows came out, and where."""
    lines = [f"engine: {result.engine}"] if result.engine else []
    if result.scores:
        lines.append(", ".join(f"{name} {value}" for name, value in result.scores.items()))
    if result.costs is not None:
        lines.append("; ".join(f"{name}: {line}" for name, line in result.costs.lines.items()))
    failed = f", {result.num_failed} FAILED (see {output}.errors.json)" if result.num_failed else ""
    rate = result.num_generated / max(result.seconds, 1e-9)
    rows = f"{result.num_rows} rows ({result.num_generated} generated now, {rate:.2f} rows/s)"
    return "\n".join([*lines, f"{rows}{failed} -> {output}"])


def note_prediction(
    model: RegisteredAdapter,
    job_id: str,
    result: JobResult,
    decoding: DecodingSettings,
    source: str,
    output: Output,
    prompt: str,
) -> None:
    """Log a run in the model's experiment, one a job, with the job's meta file."""
    scores = {key: value for key, value in (result.scores or {}).items() if isinstance(value, int | float)}
    counts = {
        "rows": result.num_rows,
        "rows_failed": result.num_failed,
        "rows_scored": scores.pop("count", 0),
    }
    settings = decoding.model_dump(exclude_none=True)
    costs = result.costs.metrics if result.costs is not None else {}
    note_use(
        model,
        "prediction",
        {"input": source, "output": output.place, "prompt": prompt, **settings},
        {**scores, **{f"system/{name}": count for name, count in counts.items()}, **costs},
        [beside(output.path, "meta")],
        job_id,
    )
