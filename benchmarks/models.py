"""Owns the models that benchmarks run on: a real base, or random weights of a size that nobody wants to ship.

Speed does not depend on what weights say, but on their shapes and on the tokens' number: prompts are real.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qlora.base.device import default_device, free_bytes
from qlora.base.model import dequantised_if_it_fits, load_base, load_tokenizer
from qlora.base.reference import resolve_base
from qlora.config import DEFAULT_BASE, BaseModelSettings
from qlora.served import load_merged

SHAPES: dict[str, dict[str, Any]] = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
_COMMON: dict[str, Any] = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "dtype": "bfloat16"}
_VOCABULARY = 32000


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --base-model, or --shape with --tokenizer."""
    parser.add_argument("--base-model", default=DEFAULT_BASE)
    parser.add_argument(
        "--shape", choices=SHAPES, help="random bfloat16 weights of this size in place of --base-model"
    )
    parser.add_argument("--tokenizer", default=DEFAULT_BASE, help="a base or a tokenizer's folder")
    parser.add_argument(
        "--within",
        type=float,
        metavar="GIB",
        help="as on a GPU with so much memory: another process has the rest",
    )


def load_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Load (model, tokenizer) as the options say, in transformers' own modules.

    A base has its dequantised weights if memory allows.
    """
    if not arguments.shape:
        return load_merged(BaseModelSettings(name=arguments.base_model)), load_tokenizer(arguments.base_model)
    return _random_model(_config(arguments.shape)).requires_grad_(False).eval(), load_words(arguments)


def load_words(arguments: argparse.Namespace) -> Any:
    """Load the tokenizer that the options name."""
    if not arguments.shape:
        return load_tokenizer(arguments.base_model)
    return _load_tokenizer(arguments.tokenizer)


def load_nf4(arguments: argparse.Namespace) -> Any:
    """Load the model as the options say, its linear layers in NF4.

    Random weights are drawn and quantised layer by layer, so that there is never more in memory than that.
    """
    if not arguments.shape:
        return load_base(BaseModelSettings(name=arguments.base_model))
    config = _config(arguments.shape)
    device = default_device()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    head = model.get_output_embeddings()
    linears = [
        (name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear) and one is not head
    ]
    generator = torch.Generator(device).manual_seed(0)
    for name, linear in linears:
        weight = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device=device)
        weight.normal_(std=config.initializer_range, generator=generator)
        quantised = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        quantised.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
        model.set_submodule(name, quantised.to(device))
    for module in model.modules():
        for name, own in list(module.named_parameters(recurse=False)):
            if own.is_meta:
                value = torch.empty(own.shape, dtype=torch.bfloat16, device=device)
                value = value.fill_(1) if own.dim() == 1 else value.normal_(std=0.02, generator=generator)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.requires_grad_(False).eval()


def load_for_work(arguments: argparse.Namespace) -> Any:
    """Load the model as trials and engines get it: with dequantised values if memory allows, else in NF4."""
    if not arguments.shape:
        return dequantised_if_it_fits(load_nf4(arguments))
    with torch.device("meta"):
        linears = [
            one for one in LlamaForCausalLM(_config(arguments.shape)).modules() if type(one) is nn.Linear
        ]
    needed = sum(2 * one.weight.numel() for one in linears)
    fits = 2 * needed < free_bytes(default_device())
    return (
        _random_model(_config(arguments.shape)).requires_grad_(False).eval() if fits else load_nf4(arguments)
    )


@contextmanager
def base_folder(arguments: argparse.Namespace, weights: bool = True) -> Iterator[str]:
    """Give a folder of the base that another library can load; of random weights it goes again afterwards.

    `weights`: whether those of a shape are written, too.
    """
    if not arguments.shape:
        yield str(resolve_base(arguments.base_model).location)
        return
    with TemporaryDirectory() as folder:
        if weights:
            model = _random_model(_config(arguments.shape))
            model.save_pretrained(folder)
            del model
            torch.cuda.empty_cache()
        else:
            config = _config(arguments.shape)
            config.architectures = ["LlamaForCausalLM"]
            config.save_pretrained(folder)
        load_words(arguments).save_pretrained(folder)
        yield folder


@contextmanager
def less_memory(gib: float | None) -> Iterator[None]:
    """Leave so many GiB of the GPU's memory free meanwhile: a process of its own has the rest."""
    if gib is None:
        yield
        return
    code = (
        "import sys, torch; free = torch.cuda.mem_get_info()[0] - int(float(sys.argv[1]) * 2**30);"
        "held = torch.empty(max(0, free), dtype=torch.uint8, device='cuda');"
        "print('held', flush=True); sys.stdin.read()"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(gib)], **pipes) as holder:
        if holder.stdout is None or holder.stdout.readline().strip() != "held":
            raise SystemExit("no process could hold the rest of the memory")
        try:
            yield
        finally:
            holder.communicate()


def _config(shape: str) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=_VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **_COMMON, **SHAPES[shape]
    )


def write_base(shape: str, tokenizer: str, folder: Path) -> None:
    """Write a base of random bfloat16 weights with a tokenizer's own vocabulary.

    Its files are those of `save_pretrained`.
    """
    words = _load_tokenizer(tokenizer)
    config = LlamaConfig(
        vocab_size=len(words),
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        **_COMMON,
        **SHAPES[shape],
    )
    _random_model(config).cpu().save_pretrained(folder)
    words.save_pretrained(folder)


def _random_model(config: LlamaConfig) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def _load_tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(name) if Path(name).is_dir() else load_tokenizer(name)


def fold(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Map token ids into the vocabulary of the random shapes."""
    return tuple(token % _VOCABULARY for token in tokens)
