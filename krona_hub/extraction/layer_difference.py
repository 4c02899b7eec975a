"""The difference of one layer in memory, its error curves, and the measured factors of a factorization."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import hypot, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.bases.weight_files import read
from krona_hub.errors import NonFiniteError
from krona_hub.extraction.error_curves import ErrorCurve
from krona_hub.extraction.report import NO_FORM, ExtractedLayer
from krona_hub.extraction.tensor_pairs import LayerPair
from krona_hub.formats.forms.normal_forms import lora_rank, size_of, words_of
from krona_hub.kron.candidates import Factorization
from krona_hub.kron.from_dense import SMALL, DenseSpectrum, RearrangedDense, dense_rows
from krona_hub.kron.rounding_noise import StorageNoise, stored_dtype
from krona_hub.kron.shapes import KronShape
from krona_hub.kron.terms import KronTerms, as_lora

SOME = 64  # terms computed by few products, if R has at least FEW rows for each
FEW = 8
BENT = 6.0  # times the noise floor, and
WEAK = 0.2  # of the largest σ: a smallest term above the noise that is below both may still be rounding
TRIES = 3
CANCELLED = 1e-3  # relative error below which float32 loses too many digits

Store = Callable[[LayerDelta], LayerDelta]  # a delta -> what the file stores of it


class Taken(NamedTuple):
    """One layer of the adapter, with its measurements."""

    delta: LayerDelta
    report: ExtractedLayer


@dataclass(frozen=True, eq=False)
class LayerDifference:
    """Δ = tuned − base of one layer, in float32, as a matrix."""

    pair: LayerPair
    delta: Tensor  # (out, in·k…)
    base: Tensor  # as stored
    stored: torch.dtype  # that tuned was rounded to
    noise: StorageNoise
    spectra: dict[KronShape, DenseSpectrum] = field(default_factory=dict)  # kept from the curves for the factors

    @classmethod
    def of(cls, pair: LayerPair) -> LayerDifference | None:
        """Return the difference of a pair, None if all values are equal. Raises NonFiniteError for NaN or infinity."""
        return cls.between(pair, read(pair.base), read(pair.tuned))

    @classmethod
    def between(cls, pair: LayerPair, base: Tensor, tuned: Tensor) -> LayerDifference | None:
        """Return the difference of weights in memory, as `of` does for files."""
        base, tuned = base.reshape(pair.size), tuned.reshape(pair.size)
        if base.dtype == tuned.dtype and torch.equal(base, tuned):
            return None
        delta = tuned.float() - base.float()
        norm = float(torch.linalg.vector_norm(delta))
        if norm == 0:
            return None
        if not isfinite(norm):
            raise NonFiniteError(
                f"{pair.name} contains NaN or infinity.", fix="Check both checkpoints; one is corrupt."
            )
        return cls(pair, delta, base, stored_dtype(tuned), StorageNoise(tuned, base))

    @property
    def size(self) -> tuple[int, int]:
        return self.delta.shape[0], self.delta.shape[1]

    @cached_property
    def energy(self) -> float:
        """‖Δ‖²"""
        return float(torch.linalg.vector_norm(self.delta, dtype=torch.float64)) ** 2

    @property
    def base_norm(self) -> float:
        return float(torch.linalg.vector_norm(self.base.float()))

    def rearranged(self, shape: KronShape) -> RearrangedDense:
        return RearrangedDense.of(self.delta[None], shape)

    def curve(self, shape: KronShape, terms: int | None = None) -> ErrorCurve:
        """Return the curve of one shape: its first terms, or all if that costs no more."""
        source = self.rearranged(shape)
        whole = terms is None or source.matrix.shape[0] <= SMALL
        spectrum = source.spectrum() if whole else source.leading(terms or 1)
        self.spectra[shape] = spectrum
        left = spectrum.left_out()[0].tolist()
        floor = self.noise.floor(shape, spectrum.sigma[0], left[0])
        return ErrorCurve(shape, tuple(left), self._above(spectrum, floor), floor)

    def _above(self, spectrum: DenseSpectrum, floor: float) -> int:
        """Return the number of terms above the noise, without those that only reflect rounding of the larger ones.

        A weak delta does not round like noise: below half an ulp all of it is lost, elsewhere it grows. This distortion
        has singular values of its own, which may slightly exceed the edge of the noise.
        """
        above = int((spectrum.sigma[0] > floor).sum())
        if above < 2 or float(spectrum.sigma[0, above - 1]) > min(BENT * floor, WEAK * float(spectrum.sigma[0, 0])):
            return above
        return bisect_left(range(above), True, lo=1, key=lambda k: self._explained_by(spectrum.first(k), floor))

    def _explained_by(self, terms: DenseSpectrum, floor: float) -> bool:
        """Return whether the base plus some sum of that many terms, rounded as tuned was, explains all but noise.

        The sum is found by repeatedly adding back its rounding residual: the terms of Δ itself are too small.
        """
        shape, count, base = terms.source.shape, terms.sigma.shape[1], self.base.float()
        for _ in range(TRIES):
            delta = terms.sums()[0].dense().float()
            rest = self.delta - ((base + delta).to(self.stored).float() - base)
            if float(RearrangedDense.of(rest[None], shape).leading(1).sigma[0, 0]) <= floor:
                return True
            terms = RearrangedDense.of((delta + rest)[None], shape).leading(count)
        return False

    def curve_to_noise(self, shape: KronShape, max_error: float | None = None) -> ErrorCurve:
        """Return the curve of one shape: its first terms if they reach the noise (and the error), else all."""
        few = min(SOME, min(shape.a1 * shape.a2, shape.b1 * shape.b2) // FEW)
        if few:
            curve = self.curve(shape, few)
            if curve.above < few and (max_error is None or curve.needed(max_error) is not None):
                return curve
        return self.curve(shape)

    def is_rounding(self) -> bool:
        """Return whether rounding may explain the whole difference, by its energy, if no term exceeds the noise."""
        return self.energy <= 1.05 * self.noise.energy

    def sums(self, form: Factorization) -> KronTerms:
        """Return the nearest sum with that factorization, float32."""
        if form.right_rank is None and form.shape[:2] == (1, 1):
            return KronTerms(torch.ones(1, 1, 1), self.delta[None].clone())
        shape = form.shape if form.right_rank is None else lora_shape(self.size)
        terms = form.right_rank or form.terms
        known = self.spectra.get(shape)
        if known is None or known.sigma.shape[1] < terms:
            known = self.rearranged(shape).leading(terms)
        fit = known.first(terms).sums()[0].to(torch.float32)
        return fit if form.right_rank is None else lora_of_terms(fit)

    def take(self, sums: KronTerms | None, store: Store, note: str = "") -> Taken:
        """Return the layer of the adapter as `store` leaves it for the file, with its errors measured on that."""
        return self.measured(store(LayerDelta(() if sums is None else (sums,), self.pair.shape)), note)

    def measured(self, delta: LayerDelta, note: str = "") -> Taken:
        """Return the layer with the errors of this delta."""
        error, beyond = self.errors(delta)
        whole = self.energy**0.5
        parameters, size = size_of(delta)
        report = ExtractedLayer(
            layer=self.pair.name,
            form=words_of(delta) if delta.sums else NO_FORM,
            terms=_count(delta),
            parameters=parameters,
            bytes=size,
            weight_shape=self.pair.shape,
            norm=whole,
            relative_norm=whole / self.base_norm if self.base_norm else float("inf"),
            relative_error=error / whole,
            beyond_rounding=beyond / whole,
            note=note,
        )
        return Taken(delta, report)

    def errors(self, delta: LayerDelta) -> tuple[float, float]:
        """Return ‖ΔW − Δ‖, and the same beyond what rounding explains of each value."""
        plain, beyond = self._errors_in(torch.float32, delta)
        return (plain, beyond) if plain > CANCELLED * self.energy**0.5 else self._errors_in(torch.float64, delta)

    def _errors_in(self, dtype: torch.dtype, delta: LayerDelta) -> tuple[float, float]:
        parts, row = [], 0
        for block in dense_rows(delta.sums[0], dtype) if delta.sums else (torch.zeros(self.size),):
            block -= self.delta[row : row + len(block)]
            rest = self.noise.beyond(block, row)
            parts.append([float(torch.linalg.vector_norm(x)) for x in (block, rest)])
            row += len(block)
        plain, beyond = zip(*parts, strict=True)
        return hypot(*plain), hypot(*beyond)


def lora_shape(size: tuple[int, int]) -> KronShape:
    """Return the shape (out, 1) ⊗ (1, in), whose terms are the ranks of a LoRA."""
    return KronShape(size[0], 1, 1, size[1])


def lora_of_terms(terms: KronTerms) -> KronTerms:
    """Return Σₖ (out, 1) ⊗ (1, in) as [[1]] ⊗ (up·down)."""
    left, right = terms.tensors
    return as_lora(left[:, :, 0].mT.contiguous(), right[:, 0].contiguous())


def _count(delta: LayerDelta) -> int:
    """Return the number of Kronecker terms, or the rank of a LoRA."""
    rank = lora_rank(delta)
    return sum(s.terms for s in delta.sums) if rank is None else rank
