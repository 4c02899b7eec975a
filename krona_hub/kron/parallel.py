"""Batches of layers side by side: a thread per core, each of one core.

The algebra is thousands of small operations, which one core does faster than several that wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MOST_THREADS = 4  # each may hold some 200 MB

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_parallel(work: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
    """Each task with its result, in order. As many threads as torch would use itself, and no more than tasks.

    >>> list(in_parallel(abs, [-1, 2]))
    [(-1, 1), (2, 2)]
    """
    threads = min(torch.get_num_threads(), MOST_THREADS, len(tasks))
    if threads < 2:
        yield from ((task, work(task)) for task in tasks)
        return
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from zip(tasks, pool.map(work, tasks), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
