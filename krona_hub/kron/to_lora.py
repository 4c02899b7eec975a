"""Conversion of Kronecker sums to LoRAs, exact or the best of a rank, computed from the factors.

    A ⊗ (up·down) = (A ⊗ up)(I ⊗ down)      SVD(A ⊗ B) = SVD(A) ⊗ SVD(B)      up: (out, r)   down: (r, in)

The singular values of one Kronecker product are all products of those of its factors, so its best LoRA of any rank
takes two small SVDs and a sort. A sum of several products becomes one long LoRA, followed by a QR of each side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.errors import ShapeError, UsageError
from krona_hub.kron.terms import Factor, KronTerms, LowRank, dense_factor, rank_bound

ROUNDING = 1e-12  # relative errors up to this one are rounding in float64
Pair = tuple[Tensor, Tensor]  # up (out, r), down (r, in)


class LoraFit(NamedTuple):
    """A fitted LoRA, its singular values and its relative error."""

    up: Tensor  # (out, r)
    down: Tensor  # (r, in)
    singular_values: Tensor  # (r,) of up·down, descending, float64
    relative_error: float  # ‖ΔW − up·down‖ / ‖ΔW‖, Frobenius; 0.0 for ΔW = 0


def exact_lora(terms: KronTerms) -> Pair:
    """Convert a Kronecker sum to one LoRA, equal up to rounding in its dtype (at least float32).

    The rank is at most Σₖ rank(Aₖ)·rank(Bₖ) and at most min(out, in); directions shared by several terms are merged.

    >>> up, down = exact_lora(KronTerms(torch.ones(1, 2, 3), torch.eye(4)[None]))
    >>> tuple(up.shape), tuple(down.shape)
    ((8, 4), (4, 12))
    """
    dtype = result_dtype([terms])
    up, down = _of_least_rank(terms, torch.finfo(dtype).eps)
    return up.to(dtype), down.to(dtype)


def nearest_lora(sums: Sequence[KronTerms], rank: int | None = None, max_error: float | None = None) -> LoraFit:
    """Return the LoRA nearest to ΔW = Σ sums in the Frobenius norm.

    Its rank is at most `rank`, and the smallest within the relative error `max_error`; with neither, the LoRA is exact
    up to rounding. Each σ is shared evenly between up and down. Raises UsageError for a rank below 1 or a negative
    error, ShapeError if the sums differ in size.

    >>> w = KronTerms(torch.diag(torch.tensor([2.0, 1.0]))[None], torch.diag(torch.tensor([3.0, 1.0]))[None])
    >>> fit = nearest_lora([w], rank=2)
    >>> fit.singular_values.tolist(), round(fit.relative_error ** 2, 3)
    ([6.0, 3.0], 0.1)
    """
    return nearest_loras([sums], rank, max_error)[0]


def nearest_loras(
    deltas: Sequence[Sequence[KronTerms]], rank: int | None = None, max_error: float | None = None
) -> list[LoraFit]:
    """Apply `nearest_lora` to many layers; single terms of equal shape share one batched SVD."""
    _check_limits(rank, max_error)
    fits: dict[int, LoraFit] = {}
    groups: dict[object, list[int]] = defaultdict(list)
    for i, sums in enumerate(deltas):
        if _is_one_dense_term(sums):
            groups[sums[0].shape, sums[0].rows].append(i)
        else:
            fits[i] = _cut(sums, *_svd_of_sum(sums), rank, max_error)
    for members in groups.values():
        fits |= zip(members, _one_term_fits([deltas[i][0] for i in members], rank, max_error), strict=True)
    return [fits[i] for i in range(len(deltas))]


def singular_values(sums: Sequence[KronTerms]) -> Tensor:
    """Return the singular values of Σ sums, descending, in float64, without its singular vectors.

    >>> singular_values([KronTerms(torch.diag(torch.tensor([2.0, 1.0]))[None], 3 * torch.eye(2)[None])]).tolist()
    [6.0, 6.0, 3.0, 3.0]
    """
    if _is_one_dense_term(sums):
        left, right = (torch.linalg.svdvals(dense_factor(f)[0].double()) for f in (sums[0].left, sums[0].right))
        return torch.outer(left, right).flatten().sort(descending=True).values
    if lora_rank_bound(sums) < min(full_size(sums)):
        up, down = long_lora(sums)
        core = torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.mT, mode="r").R.mT
    else:
        core = dense_sum(sums)
    values: Tensor = torch.linalg.svdvals(core)
    return values


def lora_rank_bound(sums: Sequence[KronTerms]) -> int:
    """Return an upper bound of the rank of Σ sums, from sizes alone.

    >>> lora_rank_bound([KronTerms(torch.ones(1, 2, 3), torch.ones(1, 8, 9))])
    16
    """
    total = sum(s.terms * rank_bound(s.left) * rank_bound(s.right) for s in sums)
    return min(total, *full_size(sums))


def full_size(sums: Sequence[KronTerms]) -> tuple[int, int]:
    """Return the common size (out, in) of some sums. Raises ShapeError if they differ or if there are none."""
    sizes = sorted({s.shape.full for s in sums})
    if len(sizes) != 1:
        raise ShapeError(
            f"the sums must have one size, but have {sizes or 'none'}.", fix="Pass the sums of one layer only."
        )
    return sizes[0]


def long_lora(sums: Sequence[KronTerms]) -> Pair:
    """Convert Σ sums to a LoRA in float64 without truncation or merging: rank Σₖ rank(Aₖ)·rank(Bₖ).

    Every product is exact up to float64 rounding, so differences of such LoRAs keep their digits.
    """
    full_size(sums)
    return _concatenated(sums, 0.0)


def shuffle_rows(rows: Tensor, terms: KronTerms) -> Tensor:
    """Reorder rows from the order of A ⊗ B to that of `terms`: (out, …) -> (out, …)."""
    if terms.rows == "kron":
        return rows
    a1, _, b1, _ = terms.shape
    return rows.reshape(a1, b1, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)


def result_dtype(sums: Iterable[KronTerms]) -> torch.dtype:
    """Return the widest dtype of all factors, at least float32."""
    return reduce(torch.promote_types, (t.dtype for s in sums for t in s.tensors), torch.float32)


def compact_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the SVD of up·down by a QR of each side: U (…, out, r), σ (…, r) and Vᴴ (…, r, in), in float64."""
    qu, ru = torch.linalg.qr(up.double())
    qd, rd = torch.linalg.qr(down.double().mT)
    u, s, vh = torch.linalg.svd(ru @ rd.mT, full_matrices=False)
    return qu @ u, s, vh @ qd.mT


def _check_limits(rank: int | None, max_error: float | None) -> None:
    if rank is not None and rank < 1:
        raise UsageError(f"Invalid rank {rank}.", fix="Choose a rank of 1 or more.")
    if max_error is not None and not max_error >= 0:
        raise UsageError(f"Invalid maximum error {max_error}.", fix="Choose an error of 0 or more.")


def _is_one_dense_term(sums: Sequence[KronTerms]) -> bool:
    return len(sums) == 1 and sums[0].terms == 1 and all(isinstance(f, Tensor) for f in (sums[0].left, sums[0].right))


# --- one term: SVD(A) ⊗ SVD(B) ---------------------------------------------------------------------------------------


def _one_term_fits(terms: list[KronTerms], rank: int | None, max_error: float | None) -> list[LoraFit]:
    """Return the best LoRAs of layers that are one dense term of one shape."""
    ua, sa, va = torch.linalg.svd(_stacked([t.left for t in terms]), full_matrices=False)
    ub, sb, vb = torch.linalg.svd(_stacked([t.right for t in terms]), full_matrices=False)
    products = (sa[:, :, None] * sb[:, None, :]).flatten(1).sort(dim=1, descending=True, stable=True)
    fits = []
    for i, (sigma, order) in enumerate(zip(products.values, products.indices, strict=True)):
        keep = _kept(sigma, rank, max_error)
        p, q = order[:keep] // sb.shape[1], order[:keep] % sb.shape[1]
        u = (ua[i][:, None, p] * ub[i][None, :, q]).flatten(0, 1)
        vh = (va[i][p][:, :, None] * vb[i][q][:, None, :]).flatten(1)
        fits.append(_shared([terms[i]], shuffle_rows(u, terms[i]), sigma, vh, keep))
    return fits


def _stacked(factors: Sequence[Factor]) -> Tensor:
    """Stack one factor of many layers: (n, p, q) in float64."""
    return torch.cat([dense_factor(f) for f in factors]).double()


# --- several terms: one long LoRA, or the dense matrix ---------------------------------------------------------------


def _svd_of_sum(sums: Sequence[KronTerms]) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the SVD of Σ sums in float64: by QR of the long LoRA if that is thinner than ΔW, otherwise dense."""
    if lora_rank_bound(sums) < min(full_size(sums)):
        return compact_svd(*long_lora(sums))
    u, s, vh = torch.linalg.svd(dense_sum(sums), full_matrices=False)
    return u, s, vh


def dense_sum(sums: Sequence[KronTerms]) -> Tensor:
    """Return Σ sums as an (out, in) matrix in float64. The last resort: it has out·in values."""
    total = torch.zeros(full_size(sums), dtype=torch.float64, device=sums[0].tensors[0].device)
    for s in sums:
        total += s.to(torch.float64).dense()
    return total


def _cut(sums: Sequence[KronTerms], u: Tensor, s: Tensor, vh: Tensor, rank: int | None, error: float | None) -> LoraFit:
    keep = _kept(s, rank, error)
    return _shared(sums, u[:, :keep], s, vh[:keep], keep)


def _kept(sigma: Tensor, rank: int | None, max_error: float | None) -> int:
    """Return how many of the descending σ to keep: as `max_error` requires, at most `rank`, and at least 1."""
    tail = sigma.square().flip(0).cumsum(0).flip(0).sqrt()  # tail[k]: error if k are kept
    needed = int((tail > max(max_error or 0.0, ROUNDING) * tail[0]).sum())
    if max_error is None and rank is not None:
        needed = int((sigma > ROUNDING * sigma[0]).sum())
    return max(1, min(needed, len(sigma) if rank is None else rank))


def _shared(sums: Sequence[KronTerms], u: Tensor, sigma: Tensor, vh: Tensor, keep: int) -> LoraFit:
    """Return the fit of the first `keep` singular triples, with the square root of each σ on either side."""
    root, whole = sigma[:keep].sqrt(), torch.linalg.vector_norm(sigma)
    error = torch.linalg.vector_norm(sigma[keep:]) / whole if whole > 0 else whole
    dtype = result_dtype(sums)
    return LoraFit((u * root).to(dtype), (root[:, None] * vh).to(dtype), sigma[:keep].clone(), float(error))


def _concatenated(sums: Sequence[KronTerms], tolerance: float) -> Pair:
    """Concatenate all terms of all sums as columns of one up and rows of one down, in float64."""
    ups, downs = [], []
    for s in sums:
        for k in range(s.terms):
            up_a, down_a = _thin(s.left, k, tolerance)
            up_b, down_b = _thin(s.right, k, tolerance)
            ups.append(shuffle_rows(_kron(up_a, up_b), s))
            downs.append(_kron(down_a, down_b))
    return torch.cat(ups, dim=1), torch.cat(downs)


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """Return A ⊗ B of two matrices. torch.kron fails on a column of a transpose (torch 2.13)."""
    return torch.einsum("ac,bd->abcd", a, b).reshape(a.shape[0] * b.shape[0], -1)


def _thin(factor: Factor, k: int, tolerance: float) -> Pair:
    """Return factor k as up·down of minimal rank: as stored, with an identity, or truncated to its rank by SVD."""
    if isinstance(factor, LowRank):
        one = factor.map(lambda t: t[k : k + 1].double())
        if factor.rank <= min(factor.shape[1:]):
            return one.up[0], one.down[0]
        matrix = one.dense()[0]
    else:
        matrix = factor[k].double()
    if tolerance and min(matrix.shape) > 1:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        rank = max(1, int((s > tolerance * s[0]).sum()))
        if rank < len(s):
            return u[:, :rank] * s[:rank], vh[:rank]
    return _with_identity(matrix)


def _of_least_rank(terms: KronTerms, tolerance: float) -> Pair:
    """Reduce the sum to its numerical rank; returns its own factors, unchanged, if that saves nothing."""
    if terms.terms == 1:
        return _concatenated([terms], tolerance)
    smallest, bound = min(terms.shape.full), lora_rank_bound([terms])
    long = _concatenated([terms], 0.0) if bound < smallest else _with_identity(dense_sum([terms]))
    u, s, vh = compact_svd(*long)
    rank = max(1, int((s > tolerance * s[0]).sum()))
    if rank == long[0].shape[1]:
        return long
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def _with_identity(matrix: Tensor) -> Pair:
    """Return a matrix as up·down with an identity on its shorter side: rank min(p, q), exact."""
    p, q = matrix.shape
    one = torch.eye(min(p, q), dtype=matrix.dtype, device=matrix.device)
    return (one, matrix) if p <= q else (matrix, one)
