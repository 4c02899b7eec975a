"""Batches of layers side by side: a thread or a process per core, each of one core.

The algebra is thousands of small operations, which one core does faster than several that wait for each other.
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

MOST_THREADS = 4  # each may hold some 200 MB
MOST_PROCESSES = 8

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Task], Result], tasks: Sequence[Task], threads: int | None = None
) -> Iterator[tuple[Task, Result]]:
    """Each task with its result, in order. By default as many threads as torch would use itself, four at most.

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
    """The same in forked processes, for work that is bound by Python itself and whose results are plain values.

    A forked process has the tensors of its parent without a copy, and no script must be guarded against it. Where
    the system has no safe fork (macOS, Windows), or the parent is one of such processes itself, threads do the work.
    Raises ResourceError where the system ends a process, as it does when memory is short.

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
                "a process was ended by the system, most likely for want of memory.",
                fix="Close other programs, or limit it with OMP_NUM_THREADS=1.",
            ) from error


@contextmanager
def _forked(work: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes know `work` and `tasks`; where the block fails, they end at once."""
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


_inherited: tuple[Callable[[Any], Any], Sequence[Any]]  # what a forked process works on


def _inherit(work: Callable[[Task], Result], tasks: Sequence[Task]) -> None:
    global _inherited
    _inherited = work, tasks
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends the others


def _work_on(place: int) -> Any:
    work, tasks = _inherited
    return work(tasks[place])


@contextmanager
def one_thread() -> Iterator[None]:
    """torch works on the calling thread alone, inside; afterwards on as many as before.

    Threads that are started inside begin with one too. Costs nothing where it is so already.

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
