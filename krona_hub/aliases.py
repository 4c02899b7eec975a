"""Type aliases shared by several packages."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]  # (done, total), in layers, bytes or steps
