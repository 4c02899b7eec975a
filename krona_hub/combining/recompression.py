"""Recompress the exact sum of a layer to fewer terms: optimally per shape, for the best shape among its parts.

The factors of one shape already form a basis: a QR of each side and an SVD of the small core give the nearest sum with
any number of terms (`kron.norms.recompress`), and the singular values give the error for every smaller number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import sqrt
from typing import NamedTuple

import torch

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.aliases import Progress
from krona_hub.conversion.convert_layers import ConvertedLayer, apply_method
from krona_hub.conversion.methods import MaxError
from krona_hub.conversion.target import ConversionTarget
from krona_hub.formats.forms.normal_forms import Lora, size_of, with_lora
from krona_hub.formats.writing.encode import why_not
from krona_hub.kron.candidates import ROUNDING
from krona_hub.kron.norms import recompress
from krona_hub.kron.parallel import in_parallel
from krona_hub.kron.shapes import KronShape
from krona_hub.kron.terms import KronTerms, LowRank, dense_factor
from krona_hub.kron.to_lora import lora_rank_bound, nearest_lora

THIN = 4  # search all shapes, through the LoRA, if the rank is this many times smaller than the matrix

Layers = Mapping[str, LayerDelta]


class Fit(NamedTuple):
    """A delta with fewer parameters, and its error."""

    delta: LayerDelta
    error: float  # relative, Frobenius

    @property
    def size(self) -> int:
        return size_of(self.delta)[0]


def to_terms(layers: Layers, terms: int, progress: Progress | None = None) -> dict[str, ConvertedLayer]:
    """Reduce every layer to at most `terms` terms of one shape, the best among the shapes of its parts.

    The terms of a LoRA are its rank. Layers with no more terms than that stay unchanged.
    """
    return _outcomes(in_parallel(lambda name: _fewer(layers[name], terms), list(layers)), len(layers), progress)


def within(
    layers: Layers, max_error: float, target: ConversionTarget, progress: Progress | None = None
) -> dict[str, ConvertedLayer]:
    """Reduce every layer to the smallest factorization that the target can hold within `max_error` (relative).

    All shapes are searched for deltas of low rank; for the others, for which that would take minutes, only the shapes
    of their parts.
    """
    kept = {name: ConvertedLayer(d) for name, d in layers.items() if not d.sums or d.magnitude is not None}
    rest = {name: d for name, d in layers.items() if name not in kept}
    thin = {name: d for name, d in rest.items() if target.to_lora or _is_thin(d)}
    thick = [name for name in rest if name not in thin]
    searched = apply_method(thin, MaxError(max_error), target, progress) if thin else {}
    found = in_parallel(lambda name: _smallest(name, rest[name], max_error, target), thick)
    return kept | searched | _outcomes(found, len(thick), progress)


def _outcomes(
    found: Iterable[tuple[str, LayerDelta]], total: int, progress: Progress | None
) -> dict[str, ConvertedLayer]:
    outcomes: dict[str, ConvertedLayer] = {}
    for name, delta in found:
        outcomes[name] = ConvertedLayer(delta)
        if progress:
            progress(len(outcomes), total)
    return outcomes


def _is_thin(delta: LayerDelta) -> bool:
    return THIN * lora_rank_bound(delta.sums) <= min(delta.matrix_shape)


# --- fixed number of terms -------------------------------------------------------------------------------------------


def _fewer(delta: LayerDelta, terms: int) -> LayerDelta:
    if delta.magnitude is not None or sum(map(_terms_of, delta.sums)) <= terms:
        return delta
    fits = [_nearest(delta, shape, terms) for shape in _shapes(delta)]
    if not fits or (_has_lora(delta) and _is_thin(delta)):  # a LoRA retains almost nothing of a delta of high rank
        fits.append(_lora(delta, rank=terms))
    return min(fits, key=lambda fit: (fit.error, fit.size)).delta


def _terms_of(s: KronTerms) -> int:
    return s.terms * s.right.rank if s.shape[:2] == (1, 1) and isinstance(s.right, LowRank) else s.terms


def _has_lora(delta: LayerDelta) -> bool:
    return any(_is_product(s) for s in delta.sums)


def _shapes(delta: LayerDelta) -> list[KronShape]:
    """Return the distinct shapes of the parts that are not LoRAs."""
    return list(dict.fromkeys(s.shape for s in delta.sums if not _is_product(s)))


def _is_product(s: KronTerms) -> bool:
    return s.shape[:2] == (1, 1) and isinstance(s.right, LowRank)


def _lora(delta: LayerDelta, *, rank: int | None = None, max_error: float | None = None) -> Fit:
    fit = nearest_lora(delta.sums, rank, max_error)
    return Fit(with_lora(delta, Lora(fit.up.float(), fit.down.float())), fit.relative_error)


def _nearest(delta: LayerDelta, shape: KronShape, terms: int) -> Fit:
    fit = recompress(delta.sums, shape, min(terms, shape.max_terms))
    return Fit(replace(delta, sums=(_slim(fit.terms, delta),)), fit.relative_error)


def _slim(terms: KronTerms, delta: LayerDelta) -> KronTerms:
    """Return the same terms with low-rank B, if the B of every part is low-rank and that is smaller.

    The columns of each new B lie in the span of the columns of the old `up` factors, so projecting onto them is exact.
    """
    ups = [s.right.up for s in delta.sums if isinstance(s.right, LowRank) and s.shape == terms.shape]
    rank, (b1, b2) = sum(len(up) * up.shape[2] for up in ups), terms.right.shape[1:]
    if len(ups) < len(delta.sums) or rank * (b1 + b2) >= b1 * b2:
        return terms
    columns = torch.cat([up.transpose(0, 1).flatten(1) for up in ups], 1).double()
    basis, right = torch.linalg.qr(columns).Q, dense_factor(terms.right)
    down = basis.mT @ right.double()
    return replace(terms, right=LowRank(basis.to(right.dtype).expand(len(right), -1, -1), down.to(right.dtype)))


# --- maximum error ---------------------------------------------------------------------------------------------------


def _smallest(name: str, delta: LayerDelta, max_error: float, target: ConversionTarget) -> LayerDelta:
    """Return the smallest candidate that the target can hold, or the unchanged delta if there is none."""

    def is_supported(delta: LayerDelta) -> bool:
        return why_not(delta, target.format, target.tool, layer=name) is None

    found = [d for d in (delta, *(fit.delta for fit in _candidates(delta, max_error))) if is_supported(d)]
    if not found:  # costly: the singular values of the whole matrix
        found = [d for d in (_lora(delta, max_error=max_error).delta,) if is_supported(d)]
    return min(found or [delta], key=lambda d: size_of(d)[0])


def _candidates(delta: LayerDelta, max_error: float) -> Iterator[Fit]:
    shapes = _shapes(delta)
    if not shapes:
        yield _lora(delta, max_error=max_error)
    for shape in shapes:
        most = min(shape.max_terms, max(1, size_of(delta)[0] // shape.parameters))
        fit = recompress(delta.sums, shape, most)
        terms = _terms_needed(fit.terms, fit.relative_error, max_error)
        if terms is not None:
            yield _nearest(delta, shape, terms)


def _terms_needed(fitted: KronTerms, error: float, max_error: float) -> int | None:
    """Return how many of the descending terms suffice, None if not even all of them do.

    With σₖ = ‖Aₖ‖·‖Bₖ‖, the error of n terms is √(rest² + Σₖ₌ₙ σₖ²), where `rest` is the error of all of them.
    """
    limit = max(max_error, ROUNDING)
    if error > limit:
        return None
    sigma = dense_factor(fitted.left).double().flatten(1).norm(dim=1) * dense_factor(fitted.right).double().flatten(
        1
    ).norm(dim=1)
    whole = float(sigma.square().sum()) / (1 - error**2) or 1.0
    tails = sigma.square().flip(0).cumsum(0).flip(0) / whole
    return max(1, sum(sqrt(float(tail) + error**2) > limit for tail in tails))
