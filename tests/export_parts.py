"""Parts of the tests of exports: a tokenizer with merges, bases of each family, adapters that change much."""

import copy
from pathlib import Path

import torch
from conftest import CONFIGS, SIZE, WORDS
from families import LLAMA3
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [f"翻譯：{one}{two} the north and the south, 12 rivers" for one in WORDS for two in WORDS]
ROWS = [
    {
        "id": f"e{n}",
        "instruction": f"翻譯：{WORDS[n % 16]}{WORDS[n * 5 % 16]} the north",
        "output": WORDS[n * 3 % 16],
    }
    for n in range(8)
]
CHATS = [
    {
        "id": row["id"],
        "messages": [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["output"]},
        ],
    }
    for row in ROWS
]
EXTENDED = {
    **{name: CONFIGS[name] for name in ("llama", "qwen2", "qwen3")},
    "mistral": type(CONFIGS["mistral"])(**SIZE, sliding_window=None),
    "llama3": type(CONFIGS["llama"])(**SIZE, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZE, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    ),
    "gemma3": Gemma3TextConfig(
        **{**SIZE, "num_hidden_layers": 6}, head_dim=16, query_pre_attn_scalar=16, sliding_window=16
    ),
}


def byte_level(split: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, at most 290 tokens."""
    tokenizer = Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    cut = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, whole]) if cut else whole
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def sentence_piece() -> PreTrainedTokenizerFast:
    """BPE with byte fallback, as Llama 2's and Mistral's, at most 290 tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    pieces = ["▁", *"thenorsu", "th", "▁th", "▁the", "or", "▁n"]
    vocabulary = {token: n for n, token in enumerate([*SPECIALS, "<unk>", *bytes_, *pieces])}
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("o", "r"), ("▁", "n")]
    tokenizer.model = models.BPE(
        vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"
    )
    return _wrapped(tokenizer, unk_token="<unk>")


def write_base(family: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write a base with weights large enough that attention matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(EXTENDED[family]), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
            elif "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, rank: int = 4, std: float = 0.1, **settings) -> Path:
    """Write an adapter with both factors drawn at random, as PEFT makes it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"target_modules": "all-linear", **settings}
    config = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", **settings)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std)
    adapted.save_pretrained(folder)
    return folder


def _trained(tokenizer: Tokenizer, alphabet: list[str]) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer, **more: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIALS[3:],
        **more,
    )
    wrapped.chat_template = CHATML
    return wrapped
