"""Owns the format `vllm`: the PEFT folder as `vllm serve --enable-lora` takes it, and the command for that.

vLLM knows one rank and one alpha an adapter, and sets memory aside for the largest rank it is told, one of a
few. An adapter of a higher rank, or with ranks of layers' own, is brought to one rank: the best product B A
of rank R, in the sum of squared errors, is that of the R largest singular values (Eckart and Young, 1936).
They are found from the factors: with B = Q_b R_b and A^T = Q_a R_a, those of R_b R_a^T, which is no larger
than the rank.

Refuses to know scores.

Source: https://docs.vllm.ai/en/latest/features/lora.html
"""

import json
import math
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.base.model import load_base
from qlora.config import InputError
from qlora.lora.peft_folder import CONFIG, WEIGHTS, load_adapter
from workflows.export.work import INSTRUCTION, Work, base_location, check_plain_lora

_MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank, in all versions that have it
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Reduction:
    """An adapter of one rank.

    lost: the share of the products' Frobenius norm that is not in it, over all layers.
    """

    matrices: dict[str, Tensor]
    lost: float


def check_for_vllm(work: Work) -> None:
    """Raise InputError for an adapter that vLLM can't serve, and for a rank that it can't be brought to."""
    config, rank = check_plain_lora(work.adapter_folder), work.settings.rank
    where, most = work.adapter_folder / CONFIG, _MAX_RANKS[-1]
    own = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if rank is not None and (rank > own or rank > most):
        raise InputError("--rank", f"{rank} is more than {min(own, most)}; the adapter has rank {own}")
    if rank is None and own > most:
        raise InputError(where, f"has rank {own}, and vLLM takes at most {most}; give --rank R")
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
    if rank is None and patterns:
        raise InputError(where, f"has {' and '.join(patterns)}, which vLLM does not read; give --rank {own}")


def write_vllm(work: Work, folder: Path) -> str | None:
    """Write the PEFT folder; return what --rank cost, in words."""
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(work.adapter_folder / name, folder / name)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    location, revision = base_location(work.base)
    config |= {"base_model_name_or_path": location, "revision": revision}
    lost, rank = None, work.settings.rank
    if rank is not None:
        reduced = reduce_rank(config, load_file(folder / WEIGHTS), rank)
        save_file(reduced.matrices, folder / WEIGHTS, metadata={"format": "pt"})
        config |= {
            "r": rank,
            "lora_alpha": rank,
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
        }
        lost = f"rank {rank} leaves out {reduced.lost:.2%} of the adapter's Frobenius norm"
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return lost


def load_vllm_folder(work: Work, folder: Path) -> tuple[Any, Any]:
    """Load the written adapter by PEFT onto the base that it is served on; the base's tokenizer stays."""
    return load_adapter(load_base(work.base), folder), work.tokenizer


def reduce_rank(config: dict[str, Any], matrices: dict[str, Tensor], rank: int) -> Reduction:
    """Bring all layers to one rank, with a scale of 1: the layers' own scales go into their matrices.

    A layer whose rank is lower gets rows of zeros.
    """
    found, all_squared, lost_squared = {}, 0.0, 0.0
    for name in [key.removesuffix(_A) for key in matrices if key.endswith(_A)]:
        A, B = matrices[name + _A].double(), matrices[name + _B].double()
        basis_b, factor_b = torch.linalg.qr(B)
        basis_a, factor_a = torch.linalg.qr(A.T)
        left, values, right = torch.linalg.svd(factor_b @ factor_a.T)
        values = values * _scale(config, name, A.shape[0])
        all_squared += float((values**2).sum())
        lost_squared += float((values[rank:] ** 2).sum())
        roots = values[:rank].sqrt()
        new_B = basis_b @ left[:, : len(roots)] * roots
        new_A = roots[:, None] * (right[: len(roots)] @ basis_a.T)
        padding = rank - len(roots)
        new_A = torch.nn.functional.pad(new_A, (0, 0, 0, padding))
        new_B = torch.nn.functional.pad(new_B, (0, padding))
        dtype = matrices[name + _A].dtype
        found[name + _A], found[name + _B] = (one.to(dtype).contiguous() for one in (new_A, new_B))
    lost = math.sqrt(lost_squared / all_squared) if all_squared else 0.0
    return Reduction(found, lost)


def serve_command(work: Work, folder: Path | str) -> str:
    """Return the command that serves the folder."""
    location, revision = base_location(work.base)
    config = json.loads((work.adapter_folder / CONFIG).read_text(encoding="utf-8"))
    rank = work.settings.rank or config["r"]
    words = ["vllm", "serve", location, *(["--revision", revision] if revision else [])]
    words += ["--enable-lora", "--lora-modules", f"{work.name}={folder}"]
    words += ["--max-lora-rank", str(next(most for most in _MAX_RANKS if most >= rank))]
    if work.base.quantization == "nf4":
        words += ["--quantization", "bitsandbytes"]
    return shlex.join(words)


def usage_of_vllm(work: Work) -> str:
    """Describe, in Markdown, how the folder is served and asked."""
    url = "http://127.0.0.1:8000/v1/"
    more: dict[str, Any] = {"max_tokens": 64, "temperature": 0, "stop_token_ids": list(work.stop_ids)}
    if work.is_chat:
        url += "chat/completions"
        more |= {"messages": [{"role": "user", "content": INSTRUCTION}]}
        if (thinking := work.thinking) is not None:
            more |= {"chat_template_kwargs": {"enable_thinking": thinking}}
    else:
        url += "completions"
        more |= {"prompt": work.example_text, "add_special_tokens": False}
    body = json.dumps({"model": work.name, **more}, ensure_ascii=False)
    values = (
        "The adapter was tuned on a base in NF4. `--quantization bitsandbytes` lets vLLM quantise the base "
        "as it loads it, to NF4 in blocks of 64 with double quantisation: the values of the tuning. On "
        "several GPUs (`--tensor-parallel-size`) the scales' own blocks are others.\n\n"
        if work.base.quantization == "nf4"
        else ""
    )
    return f"""```bash
{serve_command(work, "FOLDER")}
curl {url} -H 'Content-Type: application/json' -d {shlex.quote(body)}
```

{values}vLLM takes the base's own tokenizer and chat template.
"""


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """Return the factor of a layer's product, by PEFT's own reading of patterns."""
    from peft.utils.other import get_pattern_key

    layer = name.removeprefix("base_model.model.")
    pattern = config.get("alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(pattern.keys(), layer), config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
