"""The order in which the factors of a Kronecker sum are applied to the input, chosen by cost. Torch-free.

An input row is a matrix X (a2, b2), and A ⊗ B turns it into A X Bᵀ. So A works from the left and B from the right,
in any order; a low-rank factor is two such steps. Multiply-adds per row with one term and dense factors:

    B first   a2·b1·(b2 + a1)          A first   a1·b2·(a2 + b1)

With shape 64x4 on 1280x1280, that is 1 to 16, which is why the order matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

Side = Literal["left", "right"]
Role = Literal["open", "middle", "close"]
Sizes = Sequence[tuple[int, int]]  # (rows, columns) of the matrices on one side, in order of application


@dataclass(frozen=True)
class ChainStep:
    """One multiplication. The state before it is (N, p, k, q) with k terms side by side, one before the first step."""

    side: Side
    factor: int  # index among the chain's factors
    role: Role  # the first step opens the sum over terms, the last closes it
    p: int
    k: int
    q: int
    rows: int  # of the factor of one term
    kernel: bool = False  # whether the factor holds the kernel of a convolution
    cost: int = 0  # multiply-adds per row


@dataclass(frozen=True)
class Chain:
    """The steps from (N, in) to (N, out); the factors are numbered A before B, down before up."""

    steps: tuple[ChainStep, ...]
    terms: int

    @property
    def cost(self) -> int:
        """Multiply-adds per row."""
        return sum(step.cost for step in self.steps)


@dataclass(frozen=True)
class _Link:
    side: Side
    factor: int
    rows: int
    columns: int
    kernel: bool = False


def cheapest_chain(lefts: Sizes, rights: Sizes, terms: int = 1, kernel: int = 1) -> Chain:
    """Return the cheapest order of the matrices of A (`lefts`) and B (`rights`); () stands for an identity.

    Column counts of B exclude the `kernel` positions that its first matrix has per column.

    >>> chain = cheapest_chain([(64, 4)], [(20, 320)])
    >>> [step.side for step in chain.steps], chain.cost == 4 * 20 * (320 + 64)
    (['right', 'left'], True)
    >>> [step.side for step in cheapest_chain([(4, 64)], [(320, 20)]).steps]
    ['left', 'right']
    """
    return min(_chains(lefts, rights, terms, kernel), key=lambda chain: chain.cost)


def cheaper_beside(chain: Chain, lefts: Sizes, rights: Sizes, kernel: int = 1) -> Chain | None:
    """Return the other order of a chain if derivatives through both orders cost less than through one.

    With y = A X Bᵀ and its derivative G, one order recomputes z = X Bᵀ and needs AᵀG for dA = G zᵀ, dB = (AᵀG)ᵀ X and
    dX = (AᵀG) B. Both together need no z: dA = (G B) Xᵀ, and dX is Aᵀ (G B) if that is cheaper.

    >>> square, tall = ([(8, 8)], [(80, 80)]), ([(64, 4)], [(10, 160)])
    >>> [cheaper_beside(cheapest_chain(*sizes), *sizes) is None for sizes in (square, tall)]
    [False, True]
    """
    if len(chain.steps) != 2 or not lefts or not rights:
        return None
    one, other = sorted(
        _chains(lefts, rights, chain.terms, kernel), key=lambda c: c.steps[0].factor != chain.steps[0].factor
    )
    opened = [c.steps[0].cost for c in (one, other)]
    alone = one.cost * 2 + opened[0]
    return other if one.cost + other.cost + min(opened) < alone else None


def _chains(lefts: Sizes, rights: Sizes, terms: int, kernel: int) -> list[Chain]:
    left = [_Link("left", i, *size) for i, size in enumerate(lefts)]
    right = [_Link("right", len(left) + i, *size, kernel=i == 0 and kernel > 1) for i, size in enumerate(rights)]
    start = (lefts[0][1] if lefts else 1), (rights[0][1] if rights else 1)
    return [_chain(order, start, terms, kernel) for order in _orders(left, right)]


def _orders(left: list[_Link], right: list[_Link]) -> Iterator[list[_Link]]:
    """Yield every order that keeps the order within each side; ties go to B first."""
    total = len(left) + len(right)
    for positions in reversed(list(combinations(range(total), len(left)))):
        lefts, rights = iter(left), iter(right)
        yield [next(lefts) if i in positions else next(rights) for i in range(total)]


def _chain(order: list[_Link], start: tuple[int, int], terms: int, kernel: int) -> Chain:
    (p, q), k, steps = start, 1, []
    for i, link in enumerate(order):
        role: Role = "open" if i == 0 else "close" if i == len(order) - 1 else "middle"
        after = 1 if role == "close" else terms
        size = k * after * link.rows * link.columns * (kernel if link.kernel else 1)
        cost = size * (q if link.side == "left" else p)
        steps.append(ChainStep(link.side, link.factor, role, p, k, q, link.rows, link.kernel, cost))
        p, q = (link.rows, q) if link.side == "left" else (p, link.rows)
        k = after
    return Chain(tuple(steps), terms)
