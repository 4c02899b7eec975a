"""Reading a file while the client downloads it, so that hashing and copying finish with the download.

The client writes `<digest>.<random>.incomplete` beside the blobs of its cache and renames it at the end. This code does
not have to be reliable: the bytes read are used only if they have the digest that the Hub reports; otherwise the file
is read again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import BinaryIO

PIECE = 1 << 20  # bytes
PAUSE = 0.005  # seconds between two polls of a file that has not grown


class Follower:
    """Context manager around a download that passes its bytes to `take` in order, as they arrive.

    Does nothing if the file is not written sequentially or not downloaded at all, or on systems where the client
    cannot rename a file that is open elsewhere.
    """

    def __init__(self, folder: Path, digest: str, take: Callable[[memoryview], object]) -> None:
        self._pattern, self._folder, self._take = f"{digest}*.incomplete", folder, take
        self._done, self._inode = Event(), -1
        self._before = set(folder.glob(self._pattern))  # downloads of other processes
        self._thread = Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def has_taken(self, path: Path) -> bool:
        """Stop following, and return whether `take` received all bytes of this file, which is now complete."""
        self._end()
        return self._inode == path.stat().st_ino

    def _end(self) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        try:
            file = self._found()
            if file is not None:
                with file:
                    self._read(file)
        except OSError:  # the regular copy afterwards raises it again
            self._inode = -1

    def _found(self) -> BinaryIO | None:
        while os.name == "posix" and not self._done.is_set():
            for path in set(self._folder.glob(self._pattern)) - self._before:
                return path.open("rb", buffering=0)
            self._done.wait(PAUSE)
        return None

    def _read(self, file: BinaryIO) -> None:
        buffer = memoryview(bytearray(PIECE))
        while True:
            is_last = self._done.is_set()
            if count := file.readinto(buffer):  # type: ignore[attr-defined]
                self._take(buffer[:count])
            elif is_last:
                break
            else:
                self._done.wait(PAUSE)
        self._inode = os.fstat(file.fileno()).st_ino
