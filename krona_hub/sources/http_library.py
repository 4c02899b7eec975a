"""The HTTP library of the installed huggingface_hub, whose exceptions and timeouts krona handles."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def http_library() -> Any:
    """Return the module: `httpx` up to huggingface_hub 1.x, `httpx2` from 2.0 on.

    Versions from 1.33 on export it; before, it is the installed httpx, which they depend on.
    """
    try:
        return import_module("huggingface_hub.utils").httpx
    except AttributeError:
        return import_module("httpx")
