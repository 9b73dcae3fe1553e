"""Owns an export's steps: score the champion, write, load back, score, describe, put into place, record.

All is written into a folder beside the output, which takes its name last. So a command that is ended at any
time, or whose export is not good enough, leaves nothing under that name.
"""

import gc
import math
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlora.base.device import default_token_budget
from qlora.config import InputError
from qlora.failpoints import durable
from qlora.files import read_json, write_json, write_text
from qlora.packed.agreement import pack_attention
from qlora.perplexity import example_perplexities, mean_perplexity
from qlora.served import load_merged
from tracking.registry import note_use
from workflows.export.card import export_json, export_settings, model_card
from workflows.export.gguf_model import bytes_of_gguf, check_for_gguf, load_gguf, usage_of_gguf, write_gguf
from workflows.export.merged import bytes_of_merged, load_merged_folder, usage_of_merged, write_merged
from workflows.export.scored import check_within, ids_that_differ, plain_perplexities
from workflows.export.vllm import check_for_vllm, load_vllm_folder, usage_of_vllm, write_vllm
from workflows.export.work import Work, check_plain_lora
from workflows.lock import locked
from workflows.session import FailedError, resume_with

RESULT = "export.json"
Progress = Callable[[str, int, int], None]


def check(work: Work) -> None:
    """Raise InputError for what can't be exported so, before anything is loaded."""
    settings, base = work.settings, work.choice.base
    check_plain_lora(work.adapter_folder)
    if settings.original_weights and base.quantization == "none":
        raise InputError("--original-weights", "is how the adapter was tuned; leave it out")
    needed = 0
    match settings.format:
        case "vllm":
            check_for_vllm(work)
        case "gguf":
            check_for_gguf(work)
            needed = bytes_of_gguf(work)
        case "merged":
            needed = bytes_of_merged(work)
    there = next(path for path in settings.output.absolute().parents if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        problem = (
            f"has {free / 2**30:.1f} GiB free, and the export takes {needed / 2**30:.1f}; free some space"
        )
        raise InputError(there, problem)


def finished(work: Work) -> dict[str, Any] | None:
    """Return what a finished export of the same settings has in export.json, if it is at the output.

    Raises InputError if anything else is there.
    """
    output = work.settings.output
    is_there = output.exists() or output.is_symlink()  # which may lead nowhere
    if not is_there or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        content = read_json(output / RESULT, "name another folder")
    except (FileNotFoundError, NotADirectoryError):
        content = {}
    if content.get("settings") != export_settings(work) or not isinstance(content.get("figures"), dict):
        raise InputError(output, "is there already; name a folder that is not")
    return content


def export(work: Work, progress: Progress) -> dict[str, Any]:
    """Make the export; return the content of its export.json.

    Raises FailedError if what is loaded back is not the champion.
    """
    output = work.settings.output
    unfinished = output.with_name(f".{output.name}.part")
    was_there = unfinished.exists()  # of a killed command
    with locked(unfinished):
        try:
            _clear(unfinished)
            content = _make(work, unfinished / "export", progress)
            with durable("export put into place"):
                (unfinished / "export").replace(output)
        finally:
            _clear(unfinished)
            if was_there:
                shutil.rmtree(unfinished)
    return content


def record(work: Work, content: dict[str, Any]) -> None:
    """Log the export's use of a registered version; one that is logged already is left as it is."""
    version, output = work.choice.registered, work.settings.output
    if version is None:
        return
    resume_with(f"the export is in {output}; for its record run the same command again")
    facts = {**content["settings"], "output": str(output.absolute())}
    files = [output / RESULT, output / "README.md"]
    note_use(version, "export", facts, content["figures"], files, use_id=content["use_id"])


def _make(work: Work, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write an export into a folder, and prove it."""
    champion = _champion(work, progress)
    folder.mkdir()
    notes, usage = _write(work, folder)
    model, tokenizer = _load_back(work, folder)
    _compare_ids(work, tokenizer, notes)
    values = plain_perplexities(model, work.encoded, lambda done, total: progress("export", done, total))
    del model
    _free()
    mean = mean_perplexity(values)
    if not work.settings.original_weights:
        check_within(mean, champion, f" ({notes[0]})" if work.settings.rank else "")
    elif not math.isfinite(mean):
        raise FailedError("the export's perplexity is no finite number; nothing is written")
    else:
        notes.append(
            f"on the base's own weights it is {mean / champion - 1:+.2%} off the champion, as asked for by "
            "--original-weights"
        )
    figures = {
        "champion_perplexity": champion,
        "export_perplexity": mean,
        "difference": mean / champion - 1,
        "count": float(len(values)),
    }
    content = export_json(work, secrets.token_hex(16), figures, notes)
    write_text(folder / "README.md", model_card(work, content, usage))
    write_json(folder / RESULT, content)
    return content


def _champion(work: Work, progress: Progress) -> float:
    """Measure the champion as it is served. Raises FailedError if that gives no finite number."""
    model = load_merged(work.choice.base, str(work.adapter_folder))
    pack_attention(model, work.choice.base.name)
    values = example_perplexities(
        model, work.encoded, default_token_budget(), lambda done, total: progress("champion", done, total)
    )
    del model
    _free()
    mean = mean_perplexity(values)
    if not math.isfinite(mean):
        raise FailedError("the champion's own perplexity is no finite number; nothing is written")
    return mean


def _write(work: Work, folder: Path) -> tuple[list[str], str]:
    """Write the files of the format; return what is to be told, and how they are used."""
    match work.settings.format:
        case "merged":
            write_merged(work, folder)
            notes, usage = [], usage_of_merged(work)
        case "vllm":
            lost = write_vllm(work, folder)
            notes, usage = [lost] if lost else [], usage_of_vllm(work)
        case "gguf":
            write_gguf(work, folder)
            notes, usage = [], usage_of_gguf(work)
    _free()
    return notes, usage


def _load_back(work: Work, folder: Path) -> tuple[Any, Any]:
    match work.settings.format:
        case "merged":
            return load_merged_folder(work, folder)
        case "vllm":
            return load_vllm_folder(work, folder)
        case "gguf":
            return load_gguf(work, folder)


def _compare_ids(work: Work, tokenizer: Any, notes: list[str]) -> None:
    """Compare an export's tokens of all examples with the champion's.

    Raises FailedError if they differ; of a GGUF file, whose tokenizer transformers rebuilds from less than
    llama.cpp knows, it is told.
    """
    if tokenizer is None:
        notes.append("transformers can't read its tokenizer; it was scored with the champion's tokens")
        return
    different = ids_that_differ(work, tokenizer)
    if not different:
        notes.append(f"its own tokenizer gives the champion's tokens for all {len(work.encoded)} examples")
    elif work.settings.format == "gguf":
        notes.append(
            f"transformers' reading of its tokenizer gives other tokens for {len(different)} of "
            f"{len(work.encoded)} examples, such as {different[0]}; it was scored with the champion's"
        )
    else:
        raise FailedError(
            f"the export's tokenizer gives other tokens for {len(different)} of {len(work.encoded)} "
            f"examples, such as {different[0]}; nothing is written"
        )


def _free() -> None:
    """Give back the memory of a model that is not used any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _clear(folder: Path) -> None:
    """Remove what an export left unfinished."""
    shutil.rmtree(folder / "export", ignore_errors=True)
