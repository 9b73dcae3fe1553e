"""Owns how a model's attention gets what only this project's calls bring: a packed batch, a pass of a search.

Most families hand every keyword of a call down to attention. Some hand down none; for them it is kept while
the call lasts.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

_KEYWORDS = ("packed", "cached")
_named: ContextVar[dict[str, Any]] = ContextVar("named")
_marker = "_keeps_keywords"


def keep_keywords(model: nn.Module) -> None:
    """Have a model keep the keywords `packed` and `cached` of its calls, each while it lasts."""
    if hasattr(model, _marker):
        return

    def keep(module: nn.Module, given: Any, named: dict[str, Any]) -> None:
        _named.set({name: named[name] for name in _KEYWORDS if name in named})

    def forget(module: nn.Module, given: Any, out: Any) -> None:
        _named.set({})

    model.register_forward_pre_hook(keep, with_kwargs=True)
    model.register_forward_hook(forget, always_call=True)
    setattr(model, _marker, True)


def keywords_again() -> AbstractContextManager[None]:
    """Return what keeps, within, what is kept now: for work of a call that is done after it."""
    named = _named.get({})

    @contextmanager
    def again() -> Iterator[None]:
        before = _named.set(named)
        try:
            yield
        finally:
            _named.reset(before)

    return again()


def keyword(name: str) -> Any:
    """Return a keyword of the call that lasts; None if it has none."""
    return _named.get({}).get(name)
