"""Owns the format `gguf`: one file with merged weights and tokenizer, and a Modelfile for Ollama.

Refuses to know scores.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora.base.device import compute_dtype, default_device
from qlora.base.model import skeleton
from qlora.data.chat import ChatPrompt
from workflows.export.gguf_family import Family, add_settings, check_family, rope_factors, stored
from workflows.export.gguf_vocabulary import add_vocabulary, read_vocabulary
from workflows.export.merging import merged_tensors
from workflows.export.ollama import modelfile, template_of_text, template_of_turns, turn_texts
from workflows.export.scored import load_checked
from workflows.export.work import Work
from workflows.session import FailedError

_log = logging.getLogger(__name__)
FILE = "model.gguf"
_FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
_BLOCK = 32  # numbers that Q8_0 stores with one scale
_SAME = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
_MARK = "\u241ei\u241e"


def check_for_gguf(work: Work) -> None:
    """Raise InputError for a base that can't be said in GGUF."""
    longest = max(example.num_tokens for example in work.encoded)
    check_family(work.config, work.base.name, longest)
    read_vocabulary(work.tokenizer, work.base.name, work.config.vocab_size)


def write_gguf(work: Work, folder: Path) -> None:
    """Write the file and the Modelfile into a folder that is there."""
    family = _family(work)
    writer = gguf.GGUFWriter(folder / FILE, family.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(work.name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, work.base.name)
    writer.add_file_type(_FILE_TYPES[work.settings.gguf_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_settings(writer, work.config, family)
    vocabulary = read_vocabulary(work.tokenizer, work.base.name, work.config.vocab_size)
    add_vocabulary(writer, vocabulary, work.tokenizer)
    writer.add_add_bos_token(_begins_with_bos(work))
    writer.add_add_eos_token(False)
    if work.stop_ids[0] != work.tokenizer.eos_token_id:
        writer.add_eot_token_id(work.stop_ids[0])
    _add_tensors(writer, work, family)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stops = work.tokenizer.convert_ids_to_tokens(list(work.stop_ids))
    (folder / "Modelfile").write_text(modelfile(FILE, _template(work), stops), encoding="utf-8")


def load_gguf(work: Work, folder: Path) -> tuple[Any, Any]:
    """Load model and tokenizer by transformers' GGUF reader; None for a tokenizer that it can't read.

    It does not read all that llama.cpp does: what it leaves out is given to it from the base's config, and
    what it reads has to be the base's. Raises FailedError if it is not.
    """
    config = AutoConfig.from_pretrained(folder, gguf_file=FILE)
    for key in _SAME:
        read, own = getattr(config, key), getattr(work.config, key)
        if not np.isclose(read, own, rtol=1e-6):
            raise FailedError(
                f"loaded back, the export has {key} {read}, and its base {own}; nothing is written"
            )
    for key in _family(work).unread:
        if hasattr(work.config, key):
            setattr(config, key, getattr(work.config, key))
    dtype = compute_dtype(work.base, default_device())
    model = load_checked(AutoModelForCausalLM, folder, gguf_file=FILE, config=config, dtype=dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    except Exception as error:  # transformers 5.17's, of Gemma's without scores
        _log.info("transformers can't read the file's tokenizer: %r", error)
        return model, None
    for role in ("bos_token", "eos_token", "pad_token"):  # which transformers takes for each other here
        setattr(tokenizer, role, getattr(work.tokenizer, role))
    tokenizer.chat_template = work.tokenizer.chat_template
    return model, tokenizer


def bytes_of_gguf(work: Work) -> int:
    """Return how much disk the file takes at most."""
    return 2 * sum(parameter.numel() for parameter in skeleton(work.config).parameters())


def usage_of_gguf(work: Work) -> str:
    """Describe, in Markdown, how the file is used."""
    return f"""```bash
cd FOLDER && ollama create {work.name.lower()} -f Modelfile && ollama run {work.name.lower()}
llama-server -m FOLDER/{FILE}{" --jinja" if work.is_chat else ""}
```

`Modelfile` has the prompt's template and what ends answers. llama.cpp puts BOS in front itself, where the
adapter was trained with it.
"""


def _family(work: Work) -> Family:
    return check_family(work.config, work.base.name, 0)


def _add_tensors(writer: gguf.GGUFWriter, work: Work, family: Family) -> None:
    """Bring all tensors to the writer: matrices in 16 or 8 bits, vectors in float32."""
    names = gguf.get_tensor_name_map(_arch(family), work.config.num_hidden_layers)
    factors = rope_factors(work.config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for name, value in merged_tensors(work.base, work.adapter_folder):
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        array, kind = _encoded(stored(work.config, family, name, value), work.settings.gguf_type)
        writer.add_tensor(gguf_name, array, raw_dtype=kind)


def _encoded(value: Tensor, gguf_type: str) -> tuple[np.ndarray[Any, Any], GGMLQuantizationType | None]:
    """Return a tensor's bytes and their kind; rows that are no whole blocks stay in 16 bits."""
    if value.dim() == 1:
        return value.numpy(), None
    if gguf_type == "q8_0" and value.shape[-1] % _BLOCK == 0:
        kind = GGMLQuantizationType.Q8_0
        return quants.quantize(value.numpy(), kind), kind
    return value.to(torch.float16).numpy(), None


def _arch(family: Family) -> gguf.MODEL_ARCH:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)


def _begins_with_bos(work: Work) -> bool:
    """Tell whether what the adapter was trained on begins with BOS."""
    bos = work.tokenizer.bos_token_id
    return bos is not None and all(example.prompt[:1] == (bos,) for example in work.encoded)


def _template(work: Work) -> str | None:
    """Return the Go template of the prompt; None for a chat template that can't be brought into one."""
    prompt = work.choice.prompt
    if isinstance(prompt, ChatPrompt):
        texts = turn_texts(work.tokenizer, prompt.settings.thinking)
        return None if texts is None else template_of_turns(texts)
    before, _, behind = prompt.render(_MARK).partition(_MARK)
    return template_of_text(before, behind)
