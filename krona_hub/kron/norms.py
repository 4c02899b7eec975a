"""Norms, inner products and differences of Kronecker sums, without forming ΔW and without loss of precision.

A delta is a sequence of Kronecker sums of one size (out, in), each with its own shape and row order. Its norm is
computed by the cheapest of three methods:

    one shape      ‖Σₖ Aₖ ⊗ Bₖ‖ = ‖vec(A)ᵀ vec(B)‖, a product of two thin matrices, by a QR of each
    low rank       the delta as one long LoRA, by a QR of up and of down
    otherwise      blocks of rows of ΔW in float64, with bounded memory

Each method is accurate to about 1e-15 of the largest part, so a difference of 1e-12 is significant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import hypot, inf, sqrt

import torch
from torch import Tensor

from krona_hub.kron.from_dense import nearest_kron_of_dense
from krona_hub.kron.from_lora import nearest_kron_of_lora
from krona_hub.kron.hadamard import is_hadamard
from krona_hub.kron.shapes import KronShape, split
from krona_hub.kron.terms import Factor, KronFit, KronTerms, LowRank, check_terms, dense_factor, map_factor, rank_bound
from krona_hub.kron.to_lora import Pair, dense_sum, full_size, long_lora, lora_rank_bound, result_dtype

BLOCK = 1 << 22  # values of ΔW in memory at once: 32 MiB of float64
CANCELS = 0.1  # Σ/Σ|·| of squares below which a norm is not computed from them: digits would be lost
BLAS_ADVANTAGE = 8  # a QR is about this many times slower per operation than a matrix product

Delta = Sequence[KronTerms]


def norm(sums: Delta) -> float:
    """Return the Frobenius norm ‖Σ sums‖, accurate to about 1e-15 of its largest part even if parts cancel.

    >>> norm([KronTerms(torch.ones(1, 2, 2), 3 * torch.ones(1, 1, 4))])
    12.0
    """
    sums = [s for s in sums if s.terms]
    if not sums:
        return 0.0
    method = _cheapest(sums)
    if method == "dense":
        return _norm_by_rows(sums)
    return _norm_of_product(*(_in_r_space(sums) if method == "shape" else long_lora(sums)))


def inner(a: Delta, b: Delta) -> float:
    """Return the inner product ⟨Σ a, Σ b⟩, the sum of the products of all entries.

    >>> one = [KronTerms(torch.ones(1, 2, 2), torch.ones(1, 1, 4))]
    >>> inner(one, one)
    16.0
    """
    a, b = [s for s in a if s.terms], [s for s in b if s.terms]
    if not a or not b:
        return 0.0
    method = _cheapest([*a, *b])
    if method == "dense":
        pairs = zip(_row_blocks(a), _row_blocks(b), strict=True)
        return sum(float(torch.vdot(x.flatten(), y.flatten())) for x, y in pairs)
    to_product = _in_r_space if method == "shape" else long_lora
    (ua, da), (ub, db) = to_product(a), to_product(b)
    return float(((ua.mT @ ub) * (da @ db.mT)).sum())


def relative_difference(a: Delta, b: Delta) -> float:
    """Return ‖Σ a − Σ b‖ / ‖Σ b‖, accurate to about 1e-14; 0.0 if both are zero, inf if only b is.

    >>> one = KronTerms(torch.ones(1, 2, 2), torch.ones(1, 1, 4))
    >>> relative_difference([one.scaled(1.5)], [one])
    0.5
    """
    if _identical(a, b):
        return 0.0
    difference, reference = norm([*a, *(minus(s) for s in b)]), norm(b)
    if reference == 0:
        return 0.0 if difference == 0 else inf
    return difference / reference


def _identical(a: Delta, b: Delta) -> bool:
    """Return whether all factors have equal values and shapes."""
    return len(a) == len(b) and all(
        x.shape == y.shape
        and x.rows == y.rows
        and len(x.tensors) == len(y.tensors)
        and all(_equal(s, t) for s, t in zip(x.tensors, y.tensors, strict=True))
        for x, y in zip(a, b, strict=True)
    )


def _equal(s: Tensor, t: Tensor) -> bool:
    """Return whether two tensors have equal values; views of the same numbers are not read."""
    if s.shape != t.shape:
        return False
    same = s.data_ptr() == t.data_ptr() and s.dtype == t.dtype and s.stride() == t.stride() and s.device == t.device
    return same or (torch.equal(s, t) if s.dtype == t.dtype else torch.equal(s.double(), t.double()))


def scaled(sums: Delta, weight: float) -> tuple[KronTerms, ...]:
    """Return weight · Σ sums, sum by sum."""
    return tuple(s.scaled(weight) for s in sums)


def minus(terms: KronTerms) -> KronTerms:
    """Return −ΔW, exact in every dtype, since only signs change."""
    left = terms.left
    flipped: Factor = left.map_up(torch.neg) if isinstance(left, LowRank) else -left
    return KronTerms(flipped, terms.right, terms.rows)


def recompress(sums: Delta, shape: KronShape | tuple[int, int], terms: int) -> KronFit:
    """Return the sum of `terms` Kronecker products of one `shape` nearest to Σ sums in the Frobenius norm.

    Sums that all have this shape and one row order keep both, at the cost of a QR; others are computed from their LoRA
    if it is thin, otherwise from ΔW. Raises ShapeError if the shape does not divide the size.
    """
    full = full_size(sums)
    shape = split(full, shape[0], shape[1])
    check_terms(shape, terms)
    if {s.shape for s in sums} == {shape} and len({s.rows for s in sums}) == 1:
        return _recompressed_in_place(sums, shape, terms)
    if 4 * lora_rank_bound(sums) <= min(full):
        return nearest_kron_of_lora(*long_lora(sums), shape, terms).to(result_dtype(sums))
    return nearest_kron_of_dense(dense_sum(sums)[None], shape, terms)[0].to(result_dtype(sums))


# --- choice of a method ----------------------------------------------------------------------------------------------


def _cheapest(sums: Delta) -> str:
    """Return the cheapest of the three methods, in multiplications."""
    out, in_ = full_size(sums)
    rank = sum(s.terms * rank_bound(s.left) * rank_bound(s.right) for s in sums)
    costs = {
        "dense": out * in_ * sum(_row_cost(s) for s in sums),
        "lora": BLAS_ADVANTAGE * (out + in_) * rank**2 if rank <= max(out, in_) else inf,
    }
    if len({(s.shape, s.rows) for s in sums}) == 1 and not any(map(is_hadamard, sums)):  # these would be formed whole
        shape, terms = sums[0].shape, sum(s.terms for s in sums)
        smaller = min(terms, shape.a1 * shape.a2), min(terms, shape.b1 * shape.b2)
        work = shape.a1 * shape.a2 * terms * smaller[0] + shape.b1 * shape.b2 * terms * smaller[1]
        costs["shape"] = BLAS_ADVANTAGE * work
    return min(costs, key=lambda method: costs[method])


def _row_cost(s: KronTerms) -> int:
    """Return the multiplications per value of ΔW when it is formed by rows."""
    return s.terms * (s.right.depth if isinstance(s.right, LowRank) and s.shape.a2 == 1 else 1) + 4


def _in_r_space(sums: Delta) -> Pair:
    """Return vec(A)ᵀ (a1·a2, terms) and vec(B) (terms, b1·b2) of sums of one shape; their product is R(ΔW)."""
    left = torch.cat([dense_factor(map_factor(Tensor.double, s.left)).flatten(1) for s in sums])
    right = torch.cat([dense_factor(map_factor(Tensor.double, s.right)).flatten(1) for s in sums])
    return left.mT, right


def _norm_of_product(up: Tensor, down: Tensor) -> float:
    """Return ‖up·down‖ from the Gram matrices if nothing cancels, otherwise by a QR of both sides."""
    parts = (up.mT @ up) * (down @ down.mT)
    squared, bulk = float(parts.sum()), float(parts.abs().sum())
    if squared > CANCELS * bulk:
        return sqrt(squared)
    core = torch.linalg.qr(up).R @ torch.linalg.qr(down.mT).R.mT
    return float(torch.linalg.vector_norm(core))


# --- blocks of rows --------------------------------------------------------------------------------------------------


def _norm_by_rows(sums: Delta) -> float:
    return hypot(*(float(torch.linalg.vector_norm(block)) for block in _row_blocks(sums)))


def _row_blocks(sums: Delta) -> Iterator[Tensor]:
    """Yield ΔW from top to bottom in float64, in blocks (rows, in) of about BLOCK values."""
    out, in_ = full_size(sums)
    step = max(1, BLOCK // in_)
    for start in range(0, out, step):
        index = torch.arange(start, min(start + step, out), device=sums[0].tensors[0].device)
        block = _some_rows(sums[0], index)
        for s in sums[1:]:
            block += _some_rows(s, index)
        yield block


def _some_rows(s: KronTerms, index: Tensor) -> Tensor:
    """Return the rows `index` of ΔW: (n,) -> (n, in). Row i of A ⊗ B is Σₖ Aₖ[i // b1] ⊗ Bₖ[i % b1]."""
    a1, _, b1, _ = s.shape
    i, j = (index // b1, index % b1) if s.rows == "kron" else (index % a1, index // a1)
    left, right = _rows_of(s.left, i), _rows_of(s.right, j)  # (terms, n, a2), (terms, n, b2)
    return (left.permute(1, 2, 0) @ right.transpose(0, 1)).flatten(1)


def _rows_of(factor: Factor, index: Tensor) -> Tensor:
    if isinstance(factor, LowRank):
        return factor.map_sides(lambda up: up[:, index].double(), Tensor.double).dense()
    return factor[:, index].double()


# --- one shape -------------------------------------------------------------------------------------------------------


def _recompressed_in_place(sums: Delta, shape: KronShape, terms: int) -> KronFit:
    left, right = _in_r_space(sums)
    ql, rl = torch.linalg.qr(left)
    qr, rr = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(rl @ rr.mT, full_matrices=False)
    keep, root, whole = min(terms, len(s)), s[:terms].sqrt(), torch.linalg.vector_norm(s)
    a = (ql @ u[:, :keep] * root).mT.reshape(keep, shape.a1, shape.a2)
    b = (root[:, None] * (vh[:keep] @ qr.mT)).reshape(keep, shape.b1, shape.b2)
    error = float(torch.linalg.vector_norm(s[keep:]) / whole) if whole > 0 else 0.0
    return KronFit(KronTerms(a, b, sums[0].rows), error).to(result_dtype(sums))
