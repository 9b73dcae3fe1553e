"""Owns rotary frequencies that depend on the longest row of a pass, and keeps them from doing so.

LongRoPE and dynamic NTK choose the frequencies of all rows by the highest position among them, so that a row
would score otherwise beside a longer one. Up to a certain position they choose one set. Examples and answers
end there, and a loaded model keeps that set.

Source: LongRoPE, https://arxiv.org/abs/2402.13753
"""

from typing import Any

from torch import nn

_BY_LENGTH = ("longrope", "dynamic")


def positions_of_one_set(config: Any) -> int | None:
    """Return how many positions a base turns by one set of frequencies; None if its frequencies are fixed."""
    text = config.get_text_config()
    found = []
    for parameters in _parameters(text):
        if parameters.get("rope_type") == "dynamic":
            found.append(text.max_position_embeddings)
        elif parameters.get("rope_type") == "longrope":
            original = parameters.get("original_max_position_embeddings")
            found.append(original or text.max_position_embeddings)
    return min(found, default=None)


def fix_frequencies(model: nn.Module) -> None:
    """Keep a freshly loaded model's frequencies, which are those of short rows."""
    module: Any
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str) and kind in _BY_LENGTH:
            module.rope_type = "default"
        elif isinstance(kind, dict):
            module.rope_type = {
                layers: "default" if one in _BY_LENGTH else one for layers, one in kind.items()
            }


def _parameters(text_config: Any) -> list[dict[str, Any]]:
    """Return the rotary parameters of a config: one set, or one for each type of layer."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    nested = [one for one in parameters.values() if isinstance(one, dict)]
    return nested or [parameters]
