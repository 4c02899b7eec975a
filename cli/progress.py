"""Progress bars on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf

from krona_hub.cli.console import flag_is_set
from krona_hub.rendering.humanize import human_bytes

PATIENCE = 2.0  # seconds before a progress bar appears
BETWEEN = 0.1  # seconds between two drawings of it
WIDTH = 24  # columns of it


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left on stderr, for work that reports `(done, total)`; it appears after two seconds.

    with progress("layers") as step:
        for i, layer in enumerate(layers):
            step(i, len(layers))
    """

    def words(done: int, total: int | None, speed: float) -> str:
        return f"{_bar(label, done, total or 0)} {done:,}/{total or 0:,}{_left(done, total or 0, speed)}"

    with _drawn(words) as step:
        yield step


@contextmanager
def noted_progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """The same for work that has more to tell at every step: `(done, total, note)`."""
    note = ""

    def words(done: int, total: int | None, speed: float) -> str:
        rate = f"  {speed:.2f}/s" if speed else ""
        return f"{_bar(label, done, total or 0)} {done:,}/{total or 0:,}{rate}{_left(done, total or 0, speed)}  {note}"

    with _drawn(words) as step:

        def noted(done: int, total: int, text: str) -> None:
            nonlocal note
            note = text
            step(done, total)

        yield noted


@contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int | None], None]]:
    """The same for work that reports bytes: with the rate, and without a bar where the total is unknown."""

    def words(done: int, total: int | None, speed: float) -> str:
        rate = f"  {human_bytes(round(speed))}/s" if speed else ""
        if not total:
            return f"{label} {human_bytes(done)}{rate}"
        counts = f"{human_bytes(done)} of {human_bytes(total)}"
        return f"{_bar(label, done, total)} {counts}{rate}{_left(done, total, speed)}"

    with _drawn(words) as step:
        yield step


def counting(step: Callable[[int, int | None], None], total: int | None = None) -> Callable[[int], None]:
    """For work that reports the bytes since its last report."""
    done = 0

    def more(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        step(done, total)

    return more


@contextmanager
def _drawn(words: Callable[[int, int | None, float], str]) -> Iterator[Callable[[int, int | None], None]]:
    """A line that is drawn over and over while the block runs.

    `words` get what is done, the total and the speed per second since the first report: what came before it, such as
    the import of torch, says nothing about the work.
    """
    started, shown, first = time.monotonic(), -inf, (0.0, -1)
    wanted = sys.stderr.isatty() and not (flag_is_set("quiet") or flag_is_set("json"))

    def step(done: int, total: int | None) -> None:
        nonlocal shown, first
        now = time.monotonic()
        if first[1] < 0:
            first = now, done
        if wanted and now - started > PATIENCE and now - shown > BETWEEN:
            shown = now
            speed = (done - first[1]) / (now - first[0]) if now > first[0] else 0.0
            sys.stderr.write(f"\r\x1b[K{words(done, total, speed)}")
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


def _left(done: int, total: int, speed: float) -> str:
    """
    >>> _left(200, 400, 2.5), _left(0, 4, 0.0)
    ('  1:20 left', '')
    """
    left = round(max(total - done, 0) / speed) if speed else 0
    return f"  {left // 60}:{left % 60:02} left" if speed else ""
