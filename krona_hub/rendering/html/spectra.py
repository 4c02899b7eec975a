"""Singular values of an adapter's layers, computed from its factors, and the error of keeping fewer of them.

LoRA              σ(ΔW) through a QR of both sides             one more costs out + in
one term A ⊗ B    σ(A) · σ(B), every product                   one more (of its best LoRA) costs out + in
K terms           σ(R(ΔW)) in its own shape, by a QR           one more costs a1·a2 + b1·b2

Other layers (sums of several shapes) have no such shortcut; they are listed, never estimated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import torch
from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.errors import ShapeError
from krona_hub.formats.forms.normal_forms import lora_of, lora_rank
from krona_hub.kron.shapes import KronShape, smallest_split, split
from krona_hub.kron.terms import Factor, KronTerms, dense_factor, map_factor, rearrange
from krona_hub.kron.to_lora import compact_svd

LARGEST = 2_000_000  # entries of ΔW up to which R is formed for a chart: about two seconds
SHAPES = ((64, 4), (32, 32))  # of A: the paper's, and one near a square
PLOTTED = 64  # plotted values of a spectrum
ZERO = 1e-12  # relative to the largest value: below it is rounding error, not rank


@dataclass(frozen=True)
class LayerSpectrum:
    """The singular values of one layer in descending order, and the parameters that one more value costs."""

    layer: str
    sigma: tuple[float, ...]
    cost: int

    @property
    def energy(self) -> float:
        """‖ΔW‖²"""
        return sum(s * s for s in self.sigma)

    def lost(self, keep: int) -> float:
        """‖ΔW − its best approximation with `keep` values‖²"""
        return sum(s * s for s in self.sigma[keep:])

    def error(self, keep: int) -> float:
        """The relative error with `keep` values; 0.0 for a zero layer."""
        return sqrt(self.lost(keep) / self.energy) if self.energy else 0.0

    @property
    def half(self) -> int:
        """Half the number of values, rounded up."""
        return ceil(len(self.sigma) / 2)


@dataclass(frozen=True)
class SpectrumCurve:
    """(parameters, relative error) of all layers together."""

    name: str
    points: tuple[tuple[float, float], ...]


def spectra_of(layers: Mapping[str, LayerDelta]) -> tuple[tuple[LayerSpectrum, ...], tuple[str, ...]]:
    """Return the spectra of the layers, and the names of layers without one."""
    found = {name: _spectrum(name, delta) for name, delta in layers.items()}
    return tuple(s for s in found.values() if s), tuple(name for name, s in found.items() if s is None)


def truncated(spectra: Sequence[LayerSpectrum], name: str) -> SpectrumCurve:
    """Size and exact error of the best adapter with 1, 2, … values in every layer, over all layers."""
    whole = sum(s.energy for s in spectra)
    if not whole:
        return SpectrumCurve(name, ())
    most = max(len(s.sigma) for s in spectra)
    counts = sorted({*range(1, min(most, 32) + 1), *(most * i // 32 for i in range(1, 33)), most} - {0})
    return SpectrumCurve(
        name,
        tuple(
            (
                float(sum(min(k, len(s.sigma)) * s.cost for s in spectra)),
                sqrt(sum(s.lost(k) for s in spectra) / whole),
            )
            for k in counts
        ),
    )


@dataclass(frozen=True)
class Rearrangement:
    """The spectrum of R(ΔW) of one layer for one shape."""

    shape: KronShape
    sigma: tuple[float, ...]  # relative to ‖ΔW‖
    points: tuple[tuple[float, float], ...]  # (parameters, relative error) of 1, 2, … terms


def rearrangements(delta: LayerDelta, shapes: Iterable[tuple[int, int]] = SHAPES) -> tuple[Rearrangement, ...]:
    """Spectra of R(ΔW) for those of `shapes` that divide the layer, or for its cheapest shape if none does."""
    dense = sum(s.dense().double() for s in delta.sums)
    if not isinstance(dense, Tensor) or not bool(dense.any()):
        return ()
    fitting = []
    for shape in shapes:
        try:
            fitting.append(split(delta.matrix_shape, *shape))
        except ShapeError:
            continue
    return tuple(_rearranged(dense, shape) for shape in fitting or [smallest_split(delta.matrix_shape)])


def shown_layer(layers: Mapping[str, LayerDelta], spectra: Sequence[LayerSpectrum]) -> str | None:
    """Select the layer with the largest norm among those whose ΔW has at most LARGEST entries."""
    small = [s for s in spectra if s.energy and _entries(layers[s.layer]) <= LARGEST]
    return max(small, key=lambda s: (s.energy, s.layer)).layer if small else None


def _entries(delta: LayerDelta) -> int:
    return delta.matrix_shape[0] * delta.matrix_shape[1]


def _rearranged(dense: Tensor, shape: KronShape) -> Rearrangement:
    sigma = torch.linalg.svdvals(rearrange(dense, shape))
    relative = sigma / torch.linalg.vector_norm(sigma)
    values = tuple(float(s) for s in relative if float(s) > ZERO)
    one = LayerSpectrum("", values, shape.parameters)
    points = tuple((float(k * shape.parameters), one.error(k)) for k in range(1, min(len(values), PLOTTED) + 1))
    return Rearrangement(shape, values[:PLOTTED], points)


def _spectrum(name: str, delta: LayerDelta) -> LayerSpectrum | None:
    if lora_rank(delta) is not None:
        lora = lora_of(delta)
        sigma = None if lora is None else compact_svd(lora.up, lora.down)[1]
        return None if sigma is None else LayerSpectrum(name, _values(sigma), sum(delta.matrix_shape))
    if len(delta.sums) != 1:
        return None
    terms = delta.sums[0]
    if terms.terms == 1:
        return LayerSpectrum(name, _values(_of_one_term(terms)), sum(delta.matrix_shape))
    return LayerSpectrum(name, _values(_of_terms(terms)), terms.shape.parameters)


def _of_one_term(terms: KronTerms) -> Tensor:
    """σ(A ⊗ B) = σ(A) ⊗ σ(B)"""
    left, right = (torch.linalg.svdvals(_in_double(f)[0]) for f in (terms.left, terms.right))
    products: Tensor = torch.outer(left, right).flatten()
    return products.sort(descending=True).values


def _of_terms(terms: KronTerms) -> Tensor:
    """σ(Σₖ vec(Aₖ) vec(Bₖ)ᵀ)"""
    left, right = (_in_double(f).flatten(1).mT for f in (terms.left, terms.right))
    core = torch.linalg.qr(left).R @ torch.linalg.qr(right).R.mT
    sigma: Tensor = torch.linalg.svdvals(core)
    return sigma


def _in_double(factor: Factor) -> Tensor:
    """Convert to float64 before forming products, so that rounding does not look like rank."""
    return dense_factor(map_factor(Tensor.double, factor))


def _values(sigma: Tensor) -> tuple[float, ...]:
    """Drop values that are rounding errors; a zero layer keeps one zero."""
    kept = sigma[sigma > ZERO * sigma[:1]]
    return tuple(float(s) for s in kept) or (0.0,)
