"""LoRA → Kronecker: the nearest Kronecker sum of a LoRA, computed from its factors, for one layer or many.

    up·down ≈ Σₖ Aₖ ⊗ Bₖ     up: (out, r)   down: (r, in)   Aₖ: (a1, a2)   Bₖ: (b1, b2)

By Van Loan & Pitsianis (1993) this is the truncated SVD of R(up·down). `rearrangement.py` provides R as an operator and
`krylov.py` computes its largest triples; neither ΔW nor R is formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from krona_hub.errors import ShapeError
from krona_hub.kron.krylov import Triples, top_triples
from krona_hub.kron.parallel import in_parallel
from krona_hub.kron.rearrangement import LoraSvd, Rearranged
from krona_hub.kron.shapes import KronShape, split
from krona_hub.kron.terms import KronFit, KronTerms, check_terms

CHUNK = 1 << 23  # values of factors and vectors in memory at once: 64 MiB of float64
CANCELLED = 1e-8  # squared relative error below which 1 − Σσ²/‖W‖² has too few digits left


def nearest_kron_of_lora(up: Tensor, down: Tensor, shape: KronShape | tuple[int, int], terms: int = 1) -> KronFit:
    """Return the sum of `terms` Kronecker products nearest to up·down, and its relative error.

    up (out, r), down (r, in); `shape` is a KronShape or the size (a1, a2) of A. The result is at least float32, shares
    each σ evenly, and has fewer terms if fewer are already exact. The error is that of the returned terms, accurate to
    1e-6 of its value down to about 1e-15. Raises ShapeError if the shape does not divide the layer.

    >>> up, down = torch.ones(6, 1), torch.tensor([[1.0, 2.0, 1.0, 2.0]])
    >>> fit = nearest_kron_of_lora(up, down, (3, 2))
    >>> fit.relative_error < 1e-12, torch.allclose(fit.terms.dense(), up @ down)
    (True, True)
    """
    _check_pair(up, down)
    return nearest_kron_of_loras(up[None], down[None], shape, terms)[0]


def nearest_kron_of_loras(
    ups: Tensor | Sequence[Tensor], downs: Tensor | Sequence[Tensor], shape: KronShape | tuple[int, int], terms: int = 1
) -> list[KronFit]:
    """Apply `nearest_kron_of_lora` to n layers of one size and rank: ups n × (out, r), downs n × (r, in).

    Layers are computed in batches, so that memory stays bounded for any n.
    """
    if not len(ups):
        return []
    shape = split((ups[0].shape[0], downs[0].shape[1]), shape[0], shape[1])
    check_terms(shape, terms)
    step = max(1, CHUNK // (ups[0].shape[1] * sum(shape.full) + 32 * terms * shape.parameters))
    starts = range(0, len(ups), min(step, -(-len(ups) // 4)))

    def fit_batch(start: int) -> list[KronFit]:
        of_ups, of_downs = (torch.stack(tuple(x[start : start + starts.step])) for x in (ups, downs))
        dtype = torch.promote_types(torch.promote_types(of_ups.dtype, of_downs.dtype), torch.float32)
        return fits_of(LoraSvd.of(of_ups, of_downs), shape, terms, dtype)

    return [fit for _, fits in in_parallel(fit_batch, starts) for fit in fits]


def fits_of(lora: LoraSvd, shape: KronShape, terms: int, dtype: torch.dtype) -> list[KronFit]:
    """Return the nearest sums of n layers, given their SVD."""
    op = Rearranged.of(lora, shape)
    triples = top_triples(op, terms)
    errors = relative_errors(op, triples, lora.s.norm(dim=1))
    root = triples.sigma.sqrt()[..., None]
    left, right = op.lift(root * triples.left, root * triples.right)
    return [KronFit(KronTerms(a.to(dtype), b.to(dtype)), e) for a, b, e in zip(left, right, errors, strict=True)]


def relative_errors(op: Rearranged, triples: Triples, whole: Tensor) -> list[float]:
    """Return ‖R − Σ σ left rightᵀ‖ / ‖R‖ of each layer, given `whole` (n,) = ‖R‖; 0.0 for a zero delta."""
    energy = whole.square()
    missing = (energy - triples.sigma.square().sum(1)).clamp(min=0)
    errors = torch.where(energy > 0, (missing / energy).sqrt(), 0.0)
    close = ((missing < CANCELLED * energy) & (energy > 0)).nonzero()[:, 0]
    if len(close):
        left = triples.left[close] * triples.sigma[close][..., None]
        errors[close] = op.take(close).residual(left, triples.right[close]) / whole[close]
    return [float(e) for e in errors]


def _check_pair(up: Tensor, down: Tensor) -> None:
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise ShapeError(
            f"up {tuple(up.shape)} and down {tuple(down.shape)} must be (out, r) and (r, in) with equal r.",
            fix="Flatten a convolution from dimension 1: down.flatten(1).",
        )
