"""Owns what is found of a base before work starts: by its config, its tokenizer and its weights' headers.

What only weights show is found when they are loaded (qlora.base.model, qlora.packed.agreement).
"""

from typing import Any

from qlora.base.model import check_vocabulary, check_weights, load_config, load_tokenizer
from qlora.config import BaseModelSettings, InputError
from qlora.packed.attention import check_attention
from tuning.model_size import ModelSize, model_size


def load_facts(
    settings: BaseModelSettings, *, is_packed: bool, needs_weights: bool = True
) -> tuple[Any, Any]:
    """Load a base's config and tokenizer, and check that its weights fit them.

    `is_packed`: whether it will work with packed attention, too. `needs_weights`: whether it will work at
    all, and not be planned for only. Raises InputError, naming the base, if it can't be had or won't do.
    """
    config = load_config(settings.name)
    if is_packed:
        check_attention(config, settings.name)
    tokenizer = load_tokenizer(settings.name)
    check_vocabulary(settings, config, tokenizer)
    if needs_weights:
        check_weights(settings, config)
    return config, tokenizer


def trainable_size(config: Any, name: str) -> ModelSize:
    """Return the size of a base that adapters are to be trained on.

    Raises InputError, naming it, if it has no layer for an adapter.
    """
    size = model_size(config)
    if not size.layers:
        problem = f"{config.model_type} has no linear layers for an adapter to target; choose another base"
        raise InputError(name, problem)
    return size
