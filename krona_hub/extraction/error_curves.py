"""Error of a difference after the first terms of each shape, and the best factorization by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import log2, sqrt

from krona_hub.kron.allocation import Point
from krona_hub.kron.candidates import Factorization, nothing, parameters_of
from krona_hub.kron.shapes import KronShape

TERMS_COUNT = 0.05  # doubling the terms must save this share of the parameters

Allowed = Callable[[KronShape, int, int | None], bool]  # (shape, terms, rank of B) -> whether the target can hold it


@dataclass(frozen=True)
class ErrorCurve:
    """Errors of the nearest sums of one shape, by number of terms."""

    shape: KronShape
    left: tuple[float, ...]  # ‖Δ − k terms‖² for k = 0, 1, …; as many as were computed
    above: int  # terms whose σ exceeds the rounding noise
    floor: float  # largest σ expected of the noise

    @property
    def is_lora(self) -> bool:
        """Whether this is (out, 1) ⊗ (1, in), whose terms form a LoRA and are written as one."""
        return self.shape.a2 == self.shape.b1 == 1

    def form(self, terms: int) -> Factorization:
        """Return the factorization of the first `terms`, as written to files."""
        shape, rank = self.shape, None
        count = terms
        if self.is_lora:
            shape, rank, count = KronShape(1, 1, *self.shape.full), terms, 1
        error = sqrt(self.left[terms] / self.left[0]) if self.left[0] else 0.0
        return Factorization(shape, count, rank, parameters_of(shape, count, rank), error)

    def most(self, allowed: Allowed) -> int:
        """Return how many of the terms the target can hold."""
        known = len(self.left) - 1
        counts = (known, 1) if known > 1 else (known,)
        return next((n for n in counts if n and self._fits(n, allowed)), 0)

    def _fits(self, terms: int, allowed: Allowed) -> bool:
        form = self.form(terms)
        return allowed(form.shape, form.terms, form.right_rank)

    def needed(self, max_error: float) -> int | None:
        """Return the fewest terms within that error, None if the known ones do not suffice."""
        limit = max_error**2 * self.left[0]
        return next((k for k, left in enumerate(self.left) if left <= limit), None)


def whole(size: tuple[int, int]) -> Factorization:
    """Return the dense difference, [[1]] ⊗ Δ."""
    return Factorization(KronShape(1, 1, *size), 1, None, size[0] * size[1], 0.0)


def above_noise(
    curves: Sequence[ErrorCurve], noise: float, allowed: Allowed, most: int | None = None, *, dense: bool = True
) -> Factorization:
    """Return the factorization that explains the difference best: all terms above the noise, of the best shape.

    `noise` is the expected energy of the rounding; it sets the price of a parameter.
    """
    size, energy = curves[0].shape.full, curves[0].left[0]
    forms = [c.form(k) for c in curves if (k := min(c.above, c.most(allowed), most or c.above))]
    if dense and forms and most is None and allowed(whole(size).shape, 1, None):
        forms.append(whole(size))
    price = price_of_a_number(noise, size)
    return min(forms, key=lambda f: (cost(f, energy, price), f.order), default=nothing(size))


def cost(form: Factorization, energy: float, price: float) -> float:
    """Return residual energy plus the price of the parameters; similar factorizations with fewer terms cost less."""
    return form.relative_error**2 * energy + price * form.parameters * (1 + TERMS_COUNT * log2(max(1, form.terms)))


def price_of_a_number(noise: float, size: tuple[int, int]) -> float:
    """Return the energy a parameter must explain: twice what it explains of pure noise (Akaike's criterion)."""
    return 2 * noise / (size[0] * size[1])


def within(
    curves: Sequence[ErrorCurve], max_error: float, allowed: Allowed, *, dense: bool = True
) -> Factorization | None:
    """Return the smallest factorization within an error, None if the target can hold none."""
    size = curves[0].shape.full
    forms = [
        c.form(k) if k else nothing(size)
        for c in curves
        if (k := c.needed(max_error)) is not None and (k == 0 or k <= c.most(allowed))
    ]
    if dense and allowed(whole(size).shape, 1, None):
        forms.append(whole(size))
    return min(forms, key=lambda form: form.order, default=None)


def points(curves: Iterable[ErrorCurve], allowed: Allowed, *, dense: bool = True) -> list[Point]:
    """Return sizes and losses for budget allocation: nothing, and each shape with 1, 2, 3, 4, 6, 8, 12, … terms."""
    curves = list(curves)
    size, energy = curves[0].shape.full, curves[0].left[0]
    forms = [curve.form(k) for curve in curves for k in _steps(curve.most(allowed))]
    if dense and allowed(whole(size).shape, 1, None):
        forms.append(whole(size))
    none = Point(0, energy, nothing(size))
    return [none, *(Point(f.parameters, f.relative_error**2 * energy, f) for f in forms)]


def _steps(most: int) -> Iterator[int]:
    """
    >>> list(_steps(13))
    [1, 2, 3, 4, 6, 8, 12, 13]
    """
    k, growth = 1, 1
    while k < most:
        yield k
        growth = max(1, k // 2) if k & (k - 1) == 0 else growth
        k += growth
    if most:
        yield most
