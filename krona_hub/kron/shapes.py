"""Kronecker shapes that fit a weight, their sizes, and the rules by which other libraries choose them. Torch-free.

ΔW = Σₖ Aₖ ⊗ Bₖ     ΔW: (out, in)   Aₖ: (a1, a2)   Bₖ: (b1, b2)   out = a1·b1   in = a2·b2
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

from krona_hub.errors import ShapeError, UsageError


class KronShape(NamedTuple):
    """Shape of a Kronecker product A ⊗ B: A is (a1, a2), B is (b1, b2).

    Parameters
    ----------
    a1, a2 : int
        Size of the left factor A.
    b1, b2 : int
        Size of the right factor B.

    Examples
    --------
    >>> shape = KronShape(64, 4, 5, 192)
    >>> shape.full, shape.parameters, str(shape)
    ((320, 768), 1216, '64x4 ⊗ 5x192')
    """

    a1: int
    a2: int
    b1: int
    b2: int

    @property
    def full(self) -> tuple[int, int]:
        """Size (out, in) of A ⊗ B."""
        return self.a1 * self.b1, self.a2 * self.b2

    @property
    def max_terms(self) -> int:
        """Number of terms that represents any (out, in) matrix exactly: the rank bound of R(W)."""
        return min(self.a1 * self.a2, self.b1 * self.b2)

    @property
    def parameters(self) -> int:
        """Number of values in one term with dense factors: a1·a2 + b1·b2."""
        return self.a1 * self.a2 + self.b1 * self.b2

    def __str__(self) -> str:
        return f"{self.a1}x{self.a2} ⊗ {self.b1}x{self.b2}"


@lru_cache(maxsize=4096)
def divisors(n: int) -> tuple[int, ...]:
    """Return the divisors of n in ascending order.

    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return tuple(small + [n // d for d in reversed(small) if d * d != n])


def choices(out: int, in_: int) -> Iterator[KronShape]:
    """Yield all shapes of an (out, in) matrix, from A = [[1]] to B = [[1]].

    >>> [str(s) for s in choices(2, 3)]
    ['1x1 ⊗ 2x3', '1x3 ⊗ 2x1', '2x1 ⊗ 1x3', '2x3 ⊗ 1x1']
    """
    for a1 in divisors(out):
        for a2 in divisors(in_):
            yield KronShape(a1, a2, out // a1, in_ // a2)


def split(size: tuple[int, int], a1: int, a2: int) -> KronShape:
    """Return the shape of an (out, in) matrix with A of size (a1, a2).

    Raises ShapeError, which suggests the nearest valid shape, if a1 does not divide out or a2 does not divide in.

    >>> split((320, 768), 64, 4)
    KronShape(a1=64, a2=4, b1=5, b2=192)
    """
    out, in_ = size
    if a1 < 1 or a2 < 1 or out % a1 or in_ % a2:
        best = nearest_split(size, a1, a2)
        raise ShapeError(
            f"{a1}x{a2} does not divide a weight of {out}x{in_}.",
            fix=f"Choose {best.a1}x{best.a2}, the nearest shape that does.",
        )
    return KronShape(a1, a2, out // a1, in_ // a2)


def nearest_split(size: tuple[int, int], a1: int, a2: int) -> KronShape:
    """Return the shape whose A is nearest to (a1, a2), per side on a logarithmic scale; ties go to the smaller size.

    >>> nearest_split((30, 77), 64, 4)
    KronShape(a1=30, a2=7, b1=1, b2=11)
    """
    out, in_ = size
    c1, c2 = (
        min(divisors(n), key=lambda d: (max(d, target) / min(d, target), d))
        for n, target in ((out, max(a1, 1)), (in_, max(a2, 1)))
    )
    return KronShape(c1, c2, out // c1, in_ // c2)


def smallest_split(size: tuple[int, int]) -> KronShape:
    """Return the shape with the fewest parameters per term: a1·a2 near √(out·in), about the size of a rank-1 LoRA.

    >>> str(smallest_split((1280, 1280))), smallest_split((1280, 1280)).parameters
    ('1x1280 ⊗ 1280x1', 2560)
    """
    return min(choices(*size), key=lambda s: (s.parameters, s))


def parse_shape(text: str) -> tuple[int, int]:
    """Parse `64x4` as (a1, a2), the size of A. Raises UsageError for anything else.

    >>> parse_shape("64x4")
    (64, 4)
    """
    a1, cross, a2 = text.lower().replace("×", "x").partition("x")
    if not (cross and a1.strip().isdecimal() and a2.strip().isdecimal() and int(a1) and int(a2)):
        raise UsageError(f"Invalid shape {text!r}.", fix="Specify the size of A as A1xA2, for example 64x4.")
    return int(a1), int(a2)


def lycoris_factors(n: int, factor: int = -1) -> tuple[int, int]:
    """Return the pair (m, n/m), m ≤ n/m, into which LyCORIS splits a dimension (FORMATS.md §3, `factorization`).

    >>> lycoris_factors(320), lycoris_factors(320, 32), lycoris_factors(320, 8)
    ((16, 20), (10, 32), (8, 40))
    """
    first, second = _factor_pair(n, factor)
    return (first, second) if first <= second else (second, first)


def peft_factors(n: int, factor: int = -1) -> tuple[int, int]:
    """Return the pair of PEFT: as in LyCORIS, but not swapped if `factor` divides n and exceeds √n.

    >>> peft_factors(320), peft_factors(320, 32)
    ((16, 20), (32, 10))
    """
    return _factor_pair(n, factor)


def _factor_pair(n: int, factor: int) -> tuple[int, int]:
    """Return `factor` and its cofactor if it divides n, otherwise the most balanced pair not above it."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    limit = n if factor < 0 else factor
    m, rest = 1, n
    for d in divisors(n)[1:]:
        if d + n // d > m + rest or d > limit:
            break
        m, rest = d, n // d
    return (m, rest) if m <= rest else (rest, m)
