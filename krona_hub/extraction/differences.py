"""The difference of one layer in memory, its curves, and the numbers of a form of it, measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.adapter import LayerDelta
from krona_hub.bases.weights import read
from krona_hub.conversion.forms import lora_rank, size_of, words_of
from krona_hub.errors import NonFiniteError
from krona_hub.extraction.curves import Curve
from krona_hub.extraction.pairs import Pair
from krona_hub.extraction.report import NO_FORM, ExtractedLayer
from krona_hub.formats.encode import cast
from krona_hub.kron.dense import RearrangedDense, Spectrum, cast_terms
from krona_hub.kron.forms import Form
from krona_hub.kron.noise import StorageNoise
from krona_hub.kron.shapes import KronShape
from krona_hub.kron.sums import row_blocks
from krona_hub.kron.terms import KronTerms, as_lora

THIN = 64  # rank up to which a LoRA is looked for by few products, where a layer has FEW times as many rows
FEW = 8


class Taken(NamedTuple):
    """One layer of the adapter, and what was measured on it."""

    delta: LayerDelta
    report: ExtractedLayer


@dataclass(frozen=True, eq=False)
class Difference:
    """Δ = tuned − base of one layer, in float32, as a matrix."""

    pair: Pair
    delta: Tensor  # (out, in·k…)
    noise: StorageNoise
    base_norm: float  # ‖W‖
    spectra: dict[KronShape, Spectrum] = field(default_factory=dict)  # kept from the study for the taking

    @classmethod
    def of(cls, pair: Pair) -> Difference | None:
        """The difference of a pair; None where the numbers are equal. Raises NonFiniteError where one is not finite."""
        size = (pair.shape[0], -1)
        base, tuned = read(pair.base).reshape(size), read(pair.tuned).reshape(size)
        if base.dtype == tuned.dtype and torch.equal(base, tuned):
            return None
        delta = tuned.float() - base.float()
        if not bool(delta.any()):
            return None
        if not bool(torch.isfinite(delta).all()):
            raise NonFiniteError(f"{pair.name} holds NaN or infinity.", fix="One of the checkpoints is broken.")
        norm = float(torch.linalg.vector_norm(base.float(), dtype=torch.float64))
        return cls(pair, delta, StorageNoise.of(base, tuned), norm)

    @property
    def size(self) -> tuple[int, int]:
        return self.delta.shape[0], self.delta.shape[1]

    @property
    def energy(self) -> float:
        return float(torch.linalg.vector_norm(self.delta, dtype=torch.float64)) ** 2

    def rearranged(self, shape: KronShape) -> RearrangedDense:
        return RearrangedDense.of(self.delta[None], shape)

    def curve(self, shape: KronShape, terms: int | None = None) -> Curve:
        """The curve of one shape, whole or of its first terms."""
        source = self.rearranged(shape)
        spectrum = source.spectrum() if terms is None else source.leading(terms)
        self.spectra[shape] = spectrum
        left = spectrum.left_out()[0].tolist()
        floor = self.noise.floor(shape, spectrum.sigma[0], left[0])
        return Curve(shape, tuple(left), int((spectrum.sigma[0] > floor).sum()), floor)

    def lora_curve(self, max_error: float | None = None) -> Curve:
        """The curve of the LoRA form: its first terms where they reach the noise (and the error), else all."""
        shape, few = lora_shape(self.size), min(THIN, min(self.size) // FEW)
        if few:
            curve = self.curve(shape, few)
            if curve.above < few and (max_error is None or curve.needed(max_error) is not None):
                return curve
        return self.curve(shape)

    def is_rounding(self) -> bool:
        """Whether rounding alone may be all of it: by its energy, where no term stands above the noise."""
        return self.energy <= 1.05 * sum(self.noise.energies)

    def sums(self, form: Form) -> KronTerms:
        """The nearest sum of that form, float32."""
        if form.right_rank is None and form.shape[:2] == (1, 1):
            return KronTerms(torch.ones(1, 1, 1), self.delta[None].clone())
        shape = form.shape if form.right_rank is None else lora_shape(self.size)
        terms = form.right_rank or form.terms
        known = self.spectra.get(shape)
        if known is None or known.sigma.shape[1] < terms:
            known = self.rearranged(shape).leading(terms)
        fit = cast_terms(known.first(terms).fits()[0].terms, torch.float32)
        return fit if form.right_rank is None else lora_of_terms(fit)

    def take(self, sums: KronTerms | None, dtype: torch.dtype | None, note: str = "") -> Taken:
        """The layer of the adapter in the dtype of the file, and its errors, measured on these numbers."""
        delta = cast(LayerDelta(() if sums is None else (sums,), self.pair.shape), dtype)
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
        """‖ΔW − Δ‖, and the same without what rounding explains of every number."""
        plain = beyond = 0.0
        row = 0
        for block in row_blocks(delta.sums) if delta.sums else (torch.zeros(self.size),):
            block -= self.delta[row : row + len(block)]
            plain += float(torch.linalg.vector_norm(block)) ** 2
            rest = self.noise.beyond(block, row)
            beyond += float(torch.linalg.vector_norm(rest)) ** 2
            row += len(block)
        return plain**0.5, beyond**0.5


def lora_shape(size: tuple[int, int]) -> KronShape:
    """(out, 1) ⊗ (1, in): one rank of a LoRA a term."""
    return KronShape(size[0], 1, 1, size[1])


def lora_of_terms(terms: KronTerms) -> KronTerms:
    """Σₖ (out, 1) ⊗ (1, in) as [[1]] ⊗ (up·down)."""
    left, right = terms.tensors
    return as_lora(left[:, :, 0].mT.contiguous(), right[:, 0].contiguous())


def _count(delta: LayerDelta) -> int:
    """Kronecker terms; of a LoRA its rank."""
    rank = lora_rank(delta)
    return sum(s.terms for s in delta.sums) if rank is None else rank
