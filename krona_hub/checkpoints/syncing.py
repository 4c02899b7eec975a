"""Written bytes are sent to the disk while more are made, so that little is left for the last fsync. Torch-free."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from krona_hub.checkpoints.workers import Progress

STEP = 1 << 26  # bytes that are worth a sync


@contextmanager
def syncing_behind(file: BinaryIO) -> Iterator[Progress]:
    """Gives a function to be told the bytes written to `file`; a thread syncs them. Ends when no sync is under way.

    Nothing is promised about what is on the disk: an fsync must follow, and tells whether all went well.
    """
    behind = _Behind(file.fileno())
    thread = threading.Thread(target=behind.follow, name="krona-sync", daemon=True)
    thread.start()
    try:
        yield behind.wrote
    finally:
        behind.end()
        thread.join()


class _Behind:
    """A count of bytes that are not yet on their way, between the writers and the thread that syncs."""

    def __init__(self, file: int) -> None:
        self.file, self.waiting, self.ended = file, 0, False
        self.changed = threading.Condition()

    def wrote(self, count: int) -> None:
        with self.changed:
            self.waiting += count
            if self.waiting >= STEP:
                self.changed.notify()

    def end(self) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify()

    def follow(self) -> None:
        while self._due():
            with suppress(OSError):  # the fsync at the end tells
                getattr(os, "fdatasync", os.fsync)(self.file)

    def _due(self) -> bool:
        """Wait for enough bytes; False at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.ended or self.waiting >= STEP)
            self.waiting = 0
            return not self.ended
