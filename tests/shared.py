"""Finds the reference and real files beside the project; tests that need them skip where they are absent."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("KRONA_SHARED", ROOT.parent / "shared"))


def shared(*parts: str) -> Path:
    """A file or folder of the shared data; skips the calling test, or module, where a clone does not have it."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        why = f"needs {'/'.join(parts)} of the shared reference data (set KRONA_SHARED to its folder)"
        pytest.skip(why, allow_module_level=True)
    return path
