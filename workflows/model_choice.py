"""Owns which adapter a command works with: a PEFT folder, or a version of the registry."""

from pathlib import Path
from typing import Any


def local_adapter(adapter: str | None) -> tuple[str | None, str | None, Any]:
    """(PEFT folder, the base it names, its tracking.registry.RegisteredAdapter if it is registered) of an ADAPTER, fetched from the
    registry if need be; checked, not loaded."""
    if adapter is None:
        return None, None, None
    from qlora.lora.peft_folder import adapter_base
    from tracking.registry import fetch_adapter, is_model_uri

    if is_model_uri(adapter):
        registered = fetch_adapter(adapter)
        return str(registered.folder), adapter_base(registered.folder), registered
    folder = str(Path(adapter).resolve())
    return folder, adapter_base(folder), None
