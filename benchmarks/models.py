"""Owns the models that benchmarks run on: a real base, or random weights of a size that nobody wants to ship.

Speed does not depend on what weights say, but on their shapes and on the tokens' number: prompts are real.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qlora.base.model import load_tokenizer
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


def load_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Load (model, tokenizer) as the options say, in transformers' own modules.

    A base has its dequantised weights if memory allows.
    """
    if not arguments.shape:
        return load_merged(BaseModelSettings(name=arguments.base_model)), load_tokenizer(arguments.base_model)
    tokenizer = _load_tokenizer(arguments.tokenizer)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **_COMMON,
        **SHAPES[arguments.shape],
    )
    return _random_model(config).requires_grad_(False).eval(), tokenizer


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
