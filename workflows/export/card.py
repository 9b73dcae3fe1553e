"""Owns what an export says about itself: its model card, for people, and export.json, for programs.

Refuses to know how an export is made.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora.data.chat import ChatPrompt
from qlora.data.prompts import prompt_text
from qlora.lora.peft_folder import AdapterFiles
from qlora.provenance import git_commit, package_versions
from workflows.export.work import Work

_TITLES = {
    "merged": "a transformers folder with the adapter in its weights",
    "vllm": "a LoRA adapter as vLLM serves it",
    "gguf": "a GGUF file for llama.cpp and Ollama",
}


def export_settings(work: Work) -> dict[str, Any]:
    """Return what an export is made of, by which it is told from others."""
    settings, choice = work.settings, work.choice
    own: dict[str, dict[str, Any]] = {
        "merged": {"dtype": settings.dtype},
        "vllm": {"rank": settings.rank},
        "gguf": {"gguf_type": settings.gguf_type},
    }
    version = choice.registered
    return {
        "format": settings.format,
        **own[settings.format],
        "original_weights": settings.original_weights,
        "model": version.model_uri if version else str(work.adapter_folder),
        "adapter_digest": AdapterFiles.read(work.adapter_folder).digest,
        "base_model": choice.base.name,
        "quantization": choice.base.quantization,
        "prompt": choice.prompt.name,
        "prompt_digest": choice.prompt.digest,
        "data": work.public.words,
        "data_digest": work.public.digest,
        "max_length": work.max_length,
    }


def export_json(
    work: Work, use_id: str, figures: Mapping[str, float], notes: Sequence[str]
) -> dict[str, Any]:
    """Return the content of export.json."""
    tags = work.choice.registered.tags if work.choice.registered else {}
    keys = ("base_revision", "base_digest", "tokenizer_digest", "train_digest", "public_digest")
    return {
        "settings": export_settings(work),
        "figures": dict(figures),
        "notes": list(notes),
        "digests": {key: tags[key] for key in keys if key in tags},
        "versions": package_versions(),
        "commit": git_commit(),
        "use_id": use_id,
    }


def model_card(work: Work, content: Mapping[str, Any], usage: str) -> str:
    """Return README.md, with front matter as model hubs read it."""
    settings, figures = content["settings"], content["figures"]
    prompt = work.choice.prompt
    values = "its own weights" if work.base.quantization == "none" else "the values of NF4, dequantised"
    if settings["format"] == "vllm" and work.base.quantization != "none":
        values = "NF4"
    told = "\n".join(f"- {note}" for note in content["notes"])
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    digests = {"data": settings["data_digest"], "prompt": settings["prompt_digest"], **content["digests"]}
    rows = "\n".join(f"| {name} | `{digest}` |" for name, digest in digests.items())
    kind = "the base's chat template" if isinstance(prompt, ChatPrompt) else f"template `{prompt.name}`"
    return f"""---
base_model: {settings["base_model"]}
library_name: {"peft" if settings["format"] == "vllm" else "transformers"}
tags: [qlora]
---
# {work.name}

This is {_TITLES[settings["format"]]}, made of `{settings["model"]}` on `{settings["base_model"]}`.
The base has {values}. Replace FOLDER by where this folder is.

## How to use it

{usage}
## Prompt

It was trained under {kind}:

```yaml
{prompt_text(prompt).strip()}
```

## Public perplexity

| | |
|---|---|
| the champion, as it is served | {figures["champion_perplexity"]:.4f} |
| this export, loaded back by transformers | {figures["export_perplexity"]:.4f} |
| difference | {figures["difference"]:+.3%} |
| examples | {figures["count"]:.0f}, cut at {settings["max_length"]} tokens |

{told}

## Where it comes from

| digest | SHA-256 |
|---|---|
{rows}

{versions}; commit {content["commit"] or "unknown"}.
"""
