"""Progress bars on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf

from krona_hub.cli.console import flag_is_set
from krona_hub.rendering.humanize import human_bytes

DELAY = 2.0  # seconds before a progress bar appears
INTERVAL = 0.1  # seconds between two updates of it
WIDTH = 24  # columns of it


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with the remaining time on stderr after two seconds, for work that reports `(done, total)`.

    with progress("layers") as step:
        for i, layer in enumerate(layers):
            step(i, len(layers))
    """

    def text(done: int, total: int | None, speed: float) -> str:
        return f"{_bar(label, done, total or 0)} {done:,}/{total or 0:,}{_time_left(done, total or 0, speed)}"

    with _status_line(text) as step:
        yield step


@contextmanager
def noted_progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar for work that also reports a note at every step: `(done, total, note)`."""
    note = ""

    def text(done: int, total: int | None, speed: float) -> str:
        rate = f"  {speed:.2f}/s" if speed else ""
        left = _time_left(done, total or 0, speed)
        return f"{_bar(label, done, total or 0)} {done:,}/{total or 0:,}{rate}{left}  {note}"

    with _status_line(text) as step:

        def noted(done: int, total: int, new: str) -> None:
            nonlocal note
            note = new
            step(done, total)

        yield noted


@contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show bytes with their rate, and a bar if the total is known, for work that reports `(done, total)` in bytes."""

    def text(done: int, total: int | None, speed: float) -> str:
        rate = f"  {human_bytes(round(speed))}/s" if speed else ""
        if not total:
            return f"{label} {human_bytes(done)}{rate}"
        counts = f"{human_bytes(done)} of {human_bytes(total)}"
        return f"{_bar(label, done, total)} {counts}{rate}{_time_left(done, total, speed)}"

    with _status_line(text) as step:
        yield step


def counting(step: Callable[[int, int | None], None], total: int | None = None) -> Callable[[int], None]:
    """Adapt `step` for work that reports the bytes since its last report."""
    done = 0

    def more(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        step(done, total)

    return more


@contextmanager
def _status_line(text: Callable[[int, int | None, float], str]) -> Iterator[Callable[[int, int | None], None]]:
    """Update a status line while the block runs.

    `text` gets the work done, the total and the speed per second since the first report. Time before the first report,
    such as the import of torch, does not count as work.
    """
    started, shown, first = time.monotonic(), -inf, (0.0, -1)
    visible = sys.stderr.isatty() and not (flag_is_set("quiet") or flag_is_set("json"))

    def step(done: int, total: int | None) -> None:
        nonlocal shown, first
        now = time.monotonic()
        if first[1] < 0:
            first = now, done
        if visible and now - started > DELAY and now - shown > INTERVAL:
            shown = now
            speed = (done - first[1]) / (now - first[0]) if now > first[0] else 0.0
            sys.stderr.write(f"\r\x1b[K{text(done, total, speed)}")
            sys.stderr.flush()

    try:
        yield step
    finally:
        if shown > 0:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _bar(label: str, done: int, total: int) -> str:
    """
    >>> _bar("layers", 1, 3)
    'layers ━━━━━━━━────────────────'
    """
    filled = min(WIDTH, WIDTH * done // max(total, 1))
    return f"{label} {'━' * filled}{'─' * (WIDTH - filled)}"


def _time_left(done: int, total: int, speed: float) -> str:
    """
    >>> _time_left(200, 400, 2.5), _time_left(0, 4, 0.0)
    ('  1:20 left', '')
    """
    left = round(max(total - done, 0) / speed) if speed else 0
    return f"  {left // 60}:{left % 60:02} left" if speed else ""
