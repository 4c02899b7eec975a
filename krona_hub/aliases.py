"""Types that several packages share."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]  # done, total: layers, bytes or steps, as the caller says
