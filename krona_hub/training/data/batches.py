"""Which pictures a step takes: whole epochs in random order, every batch of one size. A function of the step alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from krona_hub.training.randomness import permutation


@dataclass(frozen=True)
class MicroBatch:
    """What one process does in one forward pass."""

    examples: tuple[int, ...]  # positions in the data set
    samples: tuple[int, ...]  # their numbers within the step: what their noise is drawn by


@dataclass(frozen=True)
class Batches:
    """The order of a training. `group` pictures of one bucket go through the model together, over all processes."""

    buckets: tuple[Hashable, ...]  # of each example
    batch_size: int  # per process
    accumulation: int
    processes: int
    seed: int

    @property
    def group(self) -> int:
        return self.batch_size * self.processes

    @property
    def per_epoch(self) -> int:
        """Groups in an epoch."""
        return sum(-(-self.buckets.count(b) // self.group) for b in dict.fromkeys(self.buckets))

    def epoch_of(self, step: int) -> float:
        """Epochs that are done when this many steps are."""
        return step * self.accumulation / self.per_epoch

    def parts(self, step: int, process: int) -> list[MicroBatch]:
        """What a process does in a step, one Part per forward pass; steps count from 0.

        The pictures of a step, over all processes, depend on `group` and `accumulation` alone.
        """
        return [self._part(step, number, process) for number in range(self.accumulation)]

    def _part(self, step: int, number: int, process: int) -> MicroBatch:
        place = step * self.accumulation + number
        epoch, inside = divmod(place, self.per_epoch)
        group = _epoch(self, epoch)[inside]
        own = range(process * self.batch_size, (process + 1) * self.batch_size)
        return MicroBatch(tuple(group[i] for i in own), tuple(number * self.group + i for i in own))


@lru_cache(maxsize=4)
def _epoch(batches: Batches, epoch: int) -> tuple[tuple[int, ...], ...]:
    """Every example once, in groups of one bucket; a bucket's last group is filled from its beginning."""
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
