"""Choose the images of a step: whole epochs in random order, each batch of one size, as a function of the step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from krona_hub.pipelines.randomness import permutation


@dataclass(frozen=True)
class MicroBatch:
    """The images of one process in one forward pass."""

    examples: tuple[int, ...]  # indices in the data set
    samples: tuple[int, ...]  # sample numbers within the step, which seed their noise


@dataclass(frozen=True)
class Batches:
    """The order of images in a run. All processes together train on `group` images of one bucket at a time."""

    buckets: tuple[Hashable, ...]  # of each example
    batch_size: int  # per process
    accumulation: int
    processes: int
    seed: int

    @property
    def group(self) -> int:
        """Images per forward pass, over all processes."""
        return self.batch_size * self.processes

    @property
    def per_epoch(self) -> int:
        """Number of groups in an epoch."""
        return sum(-(-self.buckets.count(b) // self.group) for b in dict.fromkeys(self.buckets))

    def epoch_of(self, step: int) -> float:
        """Return the number of epochs completed after `step` steps."""
        return step * self.accumulation / self.per_epoch

    def parts(self, step: int, process: int) -> list[MicroBatch]:
        """Return the micro-batches of a process in a step, one per forward pass. Steps count from 0.

        The images of a step, over all processes, depend only on `group` and `accumulation`, apart from the seed.
        """
        return [self._part(step, number, process) for number in range(self.accumulation)]

    def _part(self, step: int, number: int, process: int) -> MicroBatch:
        epoch, index = divmod(step * self.accumulation + number, self.per_epoch)
        group = _epoch(self, epoch)[index]
        own = range(process * self.batch_size, (process + 1) * self.batch_size)
        return MicroBatch(tuple(group[i] for i in own), tuple(number * self.group + i for i in own))


@lru_cache(maxsize=4)
def _epoch(batches: Batches, epoch: int) -> tuple[tuple[int, ...], ...]:
    """Return all examples in groups of one bucket; the last group of a bucket wraps around to its first examples."""
    groups: list[tuple[int, ...]] = []
    order = permutation(len(batches.buckets), batches.seed, "epoch", epoch)
    for bucket in dict.fromkeys(batches.buckets):
        groups += _groups([i for i in order if batches.buckets[i] == bucket], batches.group)
    return tuple(groups[i] for i in permutation(len(groups), batches.seed, "groups", epoch))


def _groups(members: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """
    >>> _groups([5, 6, 7], 2)
    [(5, 6), (7, 5)]
    """
    return [tuple(members[(start + i) % len(members)] for i in range(size)) for start in range(0, len(members), size)]
