"""Parallel processing of layers: one single-threaded worker, a thread or a process, per core.

The algebra consists of thousands of small operations, which run faster on one core than split over several.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from krona_hub.errors import ResourceError

MOST_THREADS = 4  # each can use about 200 MB
MOST_PROCESSES = 8

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Task], Result], tasks: Sequence[Task], threads: int | None = None
) -> Iterator[tuple[Task, Result]]:
    """Yield each task with its result, in order. The default number of threads is that of torch, at most four.

    >>> list(in_parallel(abs, [-1, 2]))
    [(-1, 1), (2, 2)]
    """
    threads = min(threads or min(torch.get_num_threads(), MOST_THREADS), len(tasks))
    if threads < 2:
        yield from ((task, work(task)) for task in tasks)
        return
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from zip(tasks, pool.map(work, tasks), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def in_processes(work: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
    """Like in_parallel, but in forked processes, for work that is bound by Python and returns plain values.

    A forked process shares the tensors of its parent without a copy, and scripts need no `__main__` guard. Uses threads
    if the system has no safe fork (macOS, Windows), or inside such a process. Raises ResourceError if the system ends a
    process, for example because memory is low.

    >>> list(in_processes(abs, [-1, 2]))
    [(-1, 1), (2, 2)]
    """
    processes = min(torch.get_num_threads(), MOST_PROCESSES, len(tasks))
    if processes < 2 or sys.platform != "linux" or multiprocessing.parent_process() is not None:
        yield from in_parallel(work, tasks)
        return
    with _forked(work, tasks, processes) as pool:
        try:
            yield from zip(tasks, pool.map(_work_on, range(len(tasks))), strict=True)
        except BrokenProcessPool as error:
            raise ResourceError(
                "a worker process was ended by the system, most likely due to insufficient memory.",
                fix="Close other programs, or set OMP_NUM_THREADS=1.",
            ) from error


@contextmanager
def _forked(work: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool whose processes inherit `work` and `tasks`; if the block fails, they are terminated."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("fork")  # arguments of a forked process are inherited, never pickled
    pool = ProcessPoolExecutor(processes, context, initializer=_inherit, initargs=(work, tasks))
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_inherited: tuple[Callable[[Any], Any], Sequence[Any]]  # (work, tasks) of a forked process


def _inherit(work: Callable[[Task], Result], tasks: Sequence[Task]) -> None:
    global _inherited
    _inherited = work, tasks
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends the others


def _work_on(index: int) -> Any:
    work, tasks = _inherited
    return work(tasks[index])


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread inside the block, and restore the number of threads afterwards.

    Threads that are started inside also use one thread. Does nothing if torch already uses one.

    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
