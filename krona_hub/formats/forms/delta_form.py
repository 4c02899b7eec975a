"""The factorization of a layer's delta: shapes, terms, ranks, row order, DoRA axis. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

from krona_hub.kron.shapes import KronShape


class SumFactorization(NamedTuple):
    """The sizes of one Kronecker sum Σₖ Aₖ ⊗ Bₖ."""

    shape: KronShape
    terms: int = 1
    left_rank: int | None = None  # rank of A = up·down; None: A is dense
    right_rank: int | None = None  # rank of B = up·down; None: B is dense
    rows: Literal["kron", "shuffled"] = "kron"

    @property
    def lora_rank(self) -> int | None:
        """Rank of the sum as a product up·down; None if the sum is not such a product as stored.

        >>> SumFactorization(KronShape(1, 1, 8, 6), right_rank=2).lora_rank
        2
        >>> SumFactorization(KronShape(8, 1, 1, 6), terms=3).lora_rank
        3
        >>> SumFactorization(KronShape(2, 2, 4, 3)).lora_rank is None
        True
        """
        a, b = self.shape[:2], self.shape[2:]
        if a == (1, 1) and self.right_rank is not None:
            return self.terms * self.right_rank
        if b == (1, 1) and self.left_rank is not None:
            return self.terms * self.left_rank
        vectors = (a[1], b[0]) == (1, 1) or (a[0], b[1]) == (1, 1)
        return self.terms if vectors and self.left_rank is None and self.right_rank is None else None

    @property
    def plain(self) -> bool:
        """Whether the rows are in the order of A ⊗ B; shuffling moves no row if A or B has only one."""
        return self.rows == "kron" or 1 in (self.shape.a1, self.shape.b1)


@dataclass(frozen=True)
class LayerFactorization:
    """The sizes of a layer's delta."""

    weight_shape: tuple[int, ...]  # (out, in) or (out, in / groups, k, …)
    sums: tuple[SumFactorization, ...]
    dora: Literal["out", "in"] | None = None
    layer: str = ""  # canonical name, if a rule needs it

    @property
    def is_conv(self) -> bool:
        return len(self.weight_shape) > 2

    @property
    def lora_rank(self) -> int | None:
        """Rank of the delta as one product up·down of its concatenated sums; None if a sum is not a LoRA."""
        ranks = [s.lora_rank for s in self.sums if s.plain]
        known = [r for r in ranks if r is not None]
        return sum(known) if len(known) == len(self.sums) else None

    @property
    def kernel(self) -> int:
        """Number of kernel elements k·k…; 1 for a linear layer."""
        return prod(self.weight_shape[2:])


def is_factored(rank: int | None, sides: tuple[int, int]) -> bool:
    """Whether LyCORIS and PEFT store a factor of these side lengths as a product: r < max/2 (FORMATS.md §3).

    They store a product of higher rank dense, which is at most twice as large.
    """
    return rank is not None and rank < max(sides) / 2


class ChannelSplit(NamedTuple):
    """How a Kronecker term splits the channels of a weight, without the kernel."""

    out: tuple[int, int]  # (a1, b1)
    in_: tuple[int, int]  # (a2, b2 / kernel)


def channel_split(form: LayerFactorization) -> ChannelSplit:
    """The split of a factorization with a single term; a LoRA counts as [[1]] ⊗ up·down."""
    out, channels = form.weight_shape[:2]
    if form.lora_rank is not None or not form.sums:
        return ChannelSplit((1, out), (1, channels))
    shape = form.sums[0].shape
    return ChannelSplit((shape.a1, shape.b1), (shape.a2, shape.b2 // form.kernel))
