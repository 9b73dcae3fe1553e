"""Owns target modules: which linear layers of a base an adapter is put on, by name.

Refuses to know adapters and models.
"""

from collections.abc import Sequence
from typing import Any


def is_targeted(name: str, wanted: Any) -> bool:
    """Tell whether a linear layer is among the target modules, by its whole name or the end of it."""
    return wanted == "all-linear" or any(f".{name}".endswith(f".{one}") for one in wanted)


def unknown_targets(wanted: Any, linear: Sequence[str]) -> str | None:
    """Describe what is wrong with target modules; return None if each of them names a linear layer.

    The head is none of these; for mixtures see qlora.base.model.linear_layers.
    """
    if wanted == "all-linear":
        return None

    def names_a_layer(target: str) -> bool:
        return any(is_targeted(name, (target,)) for name in linear)

    missing = [target for target in wanted if not names_a_layer(target)]
    if not missing:
        return None
    there = sorted({name.rpartition(".")[2] for name in linear})
    return (
        f"no linear layer is called {', '.join(missing)}; there are: {', '.join(there)} "
        "(the head takes no adapter; nor do a mixture's routers and experts, and layers of their names)"
    )
