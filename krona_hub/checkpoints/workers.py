"""Running file tasks on several threads, in order; all stop when one fails. Torch-free."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

ByteCounter = Callable[[int], None]  # receives the bytes done since the last call; never called concurrently
Task = Callable[[ByteCounter], None]  # reports the bytes done while it runs, about once per second or more often


class _Stopped(Exception):
    """Raised in a worker after another worker failed."""


def run_tasks(tasks: Iterable[Task], *, threads: int = 2, progress: ByteCounter | None = None) -> None:
    """Run all tasks, started in order, on `threads` threads; a single thread is the caller's own.

    Raises the first error; running tasks then end at their next progress report, and no other task starts.
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
    """The state that the workers share."""

    def __init__(self, tasks: Iterator[Task], progress: ByteCounter | None) -> None:
        self.tasks, self.progress = tasks, progress
        self.lock = threading.Lock()
        self.stopped = False
        self.error: BaseException | None = None

    def work(self) -> None:
        """Run tasks one by one until none is left or a worker fails."""
        try:
            while (task := self._next()) is not None:
                task(self._report)
        except _Stopped:
            pass
        except BaseException as error:
            self.error, self.stopped = self.error or error, True

    def wait(self, workers: Iterable[Future[None]]) -> None:
        """Wait for all workers. Ctrl-C reaches only the waiting thread, which then stops the workers."""
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
