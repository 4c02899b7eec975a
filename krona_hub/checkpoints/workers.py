"""Work on a file, shared out to threads: pieces in their order, and all stop when one fails. Torch-free."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

ByteCounter = Callable[[int], None]  # gets the bytes done since the last call; never called twice at a time
Task = Callable[[ByteCounter], None]  # tells the bytes it has done as it goes, at least every second or so


class _Stopped(Exception):
    """Another worker failed."""


def run_tasks(tasks: Iterable[Task], *, threads: int = 2, progress: ByteCounter | None = None) -> None:
    """Do all tasks, begun in order, `threads` side by side; with one thread in the caller's own.

    The first error comes out; tasks that run then end at their next word of progress, and no other begins.
    """
    crew = _Crew(iter(tasks), progress)
    if threads < 2:
        crew.work()
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="krona") as pool:
            crew.wait([pool.submit(crew.work) for _ in range(threads)])
    if crew.error is not None:
        raise crew.error


class _Crew:
    """What the workers share."""

    def __init__(self, tasks: Iterator[Task], progress: ByteCounter | None) -> None:
        self.tasks, self.progress = tasks, progress
        self.lock = threading.Lock()
        self.stopped = False
        self.error: BaseException | None = None

    def work(self) -> None:
        """Do one task after the other, until there are none or somebody fails."""
        try:
            while (task := self._next()) is not None:
                task(self._report)
        except _Stopped:
            pass
        except BaseException as error:
            self.error, self.stopped = self.error or error, True

    def wait(self, workers: Iterable[Future[None]]) -> None:
        """Until all are done. Ctrl-C reaches only the thread that waits: it stops the others."""
        try:
            for worker in workers:
                worker.result()
        except BaseException:
            self.stopped = True
            raise

    def _next(self) -> Task | None:
        with self.lock:
            return None if self.stopped else next(self.tasks, None)

    def _report(self, count: int) -> None:
        if self.stopped:
            raise _Stopped
        if self.progress is not None:
            with self.lock:
                self.progress(count)
