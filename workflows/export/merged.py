"""Owns the format `merged`: a plain transformers folder, with the adapter in the weights.

It needs no PEFT and no bitsandbytes. Tokenizer, chat template and generation config come with it, and the
generation config ends answers where the adapter was trained to end them.

Refuses to know scores.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora.base.model import skeleton
from workflows.export.merging import merged_tensors
from workflows.export.scored import load_checked
from workflows.export.work import INSTRUCTION, Work, base_location

_MAX_SHARD = "4GB"


def write_merged(work: Work, folder: Path) -> None:
    """Write model, tokenizer, chat template and generation config into a folder that is there."""
    dtype = getattr(torch, work.settings.dtype)
    state = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in merged_tensors(work.base, work.adapter_folder)
    }
    model: Any = skeleton(work.config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or model._tied_weights_keys or ())
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    model.tie_weights()
    model.generation_config = _generation_config(work)
    model.save_pretrained(folder, max_shard_size=_MAX_SHARD)
    work.tokenizer.save_pretrained(folder)
    template = folder / "chat_template.jinja"
    if work.tokenizer.chat_template and not template.exists():  # some tokenizers keep it within their config
        template.write_text(work.tokenizer.chat_template, encoding="utf-8")


def load_merged_folder(work: Work, folder: Path) -> tuple[Any, Any]:
    """Load model and tokenizer of a written folder, in its own dtype on GPUs, in float32 on CPUs.

    Most CPUs have no units for 16 bits; the values are those of the folder all the same.
    """
    dtype: Any = "auto" if torch.cuda.is_available() else torch.float32
    model = load_checked(AutoModelForCausalLM, folder, dtype=dtype, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return model, tokenizer


def bytes_of_merged(work: Work) -> int:
    """Return how much disk the weights take."""
    return 2 * sum(parameter.numel() for parameter in skeleton(work.config).parameters())


def usage_of_merged(work: Work) -> str:
    """Describe, in Markdown, how the folder is used."""
    if work.is_chat:
        thinking = "" if work.thinking is None else f", enable_thinking={work.thinking}"
        asked = (
            f'turns = [{{"role": "user", "content": {INSTRUCTION!r}}}]\n'
            "text = tokenizer.apply_chat_template("
            f"turns, tokenize=False, add_generation_prompt=True{thinking})"
        )
    else:
        asked = f"text = {work.example_text!r}"
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
{asked}
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0, ids.shape[1]:], skip_special_tokens=True))
```
"""


def _generation_config(work: Work) -> GenerationConfig:
    """Return the base's own generation config, with all tokens that end answers."""
    location, revision = base_location(work.base)
    try:
        config = GenerationConfig.from_pretrained(
            location, revision=revision, local_files_only=Path(location).is_dir()
        )
    except OSError:  # it has none
        config = GenerationConfig.from_model_config(work.config)
    own = config.eos_token_id
    ends = [*([own] if isinstance(own, int) else own or ()), *work.stop_ids]
    found = list(dict.fromkeys(ends))
    config.eos_token_id = found if len(found) > 1 else found[0]
    return config
