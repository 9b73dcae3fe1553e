"""Owns a tokenizer in GGUF: tokens, their kinds, merges or scores, how text is split, what comes first.

There are two kinds. Byte-level BPE (`gpt2`) keeps merges, and a name that stands for the expression which
splits text; a tokenizer whose expression has no name is refused. BPE with byte fallback, SentencePiece's
(`llama`), keeps a score a token instead: the pair that makes the token of the highest score is merged first,
so scores are the merges' order.

Refuses to know models.

Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

import json
from dataclasses import dataclass
from typing import Any

import gguf
from gguf import TokenType

from qlora.config import InputError

_GPT_4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (expression, whether a word of the vocabulary is taken without merges) -> llama.cpp's name
_NAMES = {
    (_GPT_4.replace("NUMBER", r"\p{N}{1,3}"), True): "llama-bpe",
    (_GPT_4.replace("NUMBER", r"\p{N}{1,3}"), False): "smaug-bpe",
    (_GPT_4.replace("NUMBER", r"\p{N}"), False): "qwen2",
    (_TEKKEN, True): "tekken",
}
_SPACE = "\u2581"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF has it.

    model: `gpt2` or `llama`. pre: the name of how text is split. merges: of `gpt2`. scores: of `llama`.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str] | None
    scores: list[float] | None
    adds_space: bool


def read_vocabulary(tokenizer: Any, base: str, num_rows: int) -> Vocabulary:
    """Read a tokenizer for a model whose embedding has `num_rows` rows.

    Raises InputError, naming the base, for one that GGUF has no name for.
    """
    if not tokenizer.is_fast:
        raise InputError(
            base, "its tokenizer has no tokenizer.json, which GGUF's is made of; use --format merged"
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
    if model["type"] != "BPE" or not merges:
        raise InputError(
            base,
            f"its tokenizer is {model['type']} without merges, which can't be said in GGUF; "
            "use --format merged",
        )
    is_spm = bool(model.get("byte_fallback"))
    tokens, types = _tokens(tokenizer, model, num_rows, is_spm)
    if is_spm:
        scores = _scores(tokens, merges)
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
        return Vocabulary("llama", "default", tokens, types, None, scores, first.startswith(_SPACE))
    return Vocabulary("gpt2", _split_name(content, base), tokens, types, merges, None, False)


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, tokenizer: Any) -> None:
    """Write a vocabulary, the special tokens' ids and the chat template."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None and number < len(vocabulary.tokens):
            add(number)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(
    tokenizer: Any, model: dict[str, Any], num_rows: int, is_spm: bool
) -> tuple[list[str], list[TokenType]]:
    """Return the text and kind of each row's token; rows without one get a name that no text has.

    Tokens without a row, which some tokenizers have, are left out: no model could read them.
    """
    known = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(num_rows):
        text, kind = known.get(number), TokenType.NORMAL
        if text is None:
            text, kind = f"[PAD{number}]", TokenType.UNUSED
        elif number in added:
            is_control = added[number].special
            kind = TokenType.CONTROL if is_control else TokenType.USER_DEFINED
            text = text if is_control else text.replace(_SPACE, " ")
        elif is_spm and len(text) == 6 and text.startswith("<0x"):
            kind = TokenType.BYTE
        if is_spm and text == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return a score a token: the earlier the first merge that makes it, the higher."""
    order: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        order.setdefault(merge.replace(" ", ""), rank)
    return [-float(order.get(token, -1) + 1) for token in tokens]


def _split_name(content: dict[str, Any], base: str) -> str:
    """Return llama.cpp's name of how a byte-level tokenizer splits text. Raises InputError if it has none."""
    splitter = content["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers") or [splitter]
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            expression = steps[0]["pattern"].get("Regex", "")
            name = _NAMES.get((expression, bool(content["model"].get("ignore_merges"))))
            if name:
                return name
    raise InputError(
        base, "its tokenizer splits text in a way that GGUF has no name for; use --format merged"
    )
