"""The HTTP library of the installed huggingface_hub, whose exceptions and timeouts krona handles."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def http_library() -> Any:
    """Return the module that huggingface_hub exports as `httpx`: in version 2 it is httpx2."""
    return import_module("huggingface_hub.utils").httpx
