"""Owns the size of a base in numbers, read off its config without its weights."""

import math
from dataclasses import dataclass
from typing import Any

from qlora.base.model import attention_shape, linear_layers, skeleton
from qlora.base.recomputed import can_recompute
from qlora.config import TrialSettings
from qlora.lora.targets import is_targeted


@dataclass(frozen=True)
class ModelSize:
    """A base in numbers.

    linear: parameters of its linear layers, without the head; other: of the rest. layers: (inputs, outputs)
    of each linear layer. norm_width, attention_width, cache_width, mlp_width: numbers of a token, over all
    layers, that norms take, that attention takes and gives, that are keys and values, and that are inside the
    MLPs. can_recompute: see qlora.base.recomputed.
    """

    linear: int
    other: int
    layers: dict[str, tuple[int, int]]
    vocabulary: int
    hidden: int
    num_layers: int
    norm_width: int
    attention_width: int
    cache_width: int
    mlp_width: int
    can_recompute: bool

    def adapter_parameters(self, settings: TrialSettings) -> int:
        """Count the parameters of a trial's adapter."""
        widths = sum(
            num_in + num_out
            for name, (num_in, num_out) in self.layers.items()
            if is_targeted(name, settings.target_modules)
        )
        return settings.lora_r * widths

    def adapted_inputs(self, settings: TrialSettings) -> list[int]:
        """Return the inputs of each linear layer that a trial adapts."""
        return [
            num_in for name, (num_in, _) in self.layers.items() if is_targeted(name, settings.target_modules)
        ]

    @property
    def layer_widths(self) -> int:
        """Sum what linear layers take and give for a token."""
        return sum(num_in + num_out for num_in, num_out in self.layers.values())


def model_size(config: Any) -> ModelSize:
    """Measure a model of this config that has no weights."""
    model = skeleton(config)
    text, shape, layers = config.get_text_config(), attention_shape(config), linear_layers(model)
    linear = sum(math.prod(widths) for widths in layers.values())
    return ModelSize(
        linear=linear,
        other=sum(parameter.numel() for parameter in model.parameters()) - linear,
        layers=layers,
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        num_layers=shape.num_layers,
        norm_width=shape.num_layers * 2 * text.hidden_size,
        attention_width=shape.num_layers * 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim,
        cache_width=shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim,
        mlp_width=shape.num_layers * getattr(text, "intermediate_size", 4 * text.hidden_size),
        can_recompute=can_recompute(model),
    )
