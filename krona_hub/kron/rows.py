"""Exact row operations on Kronecker sums: parts of fused projections, swapped halves, transposes (FORMATS §13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from krona_hub.errors import ShapeError, UnsupportedError
from krona_hub.kron.hadamard import Hadamard
from krona_hub.kron.terms import Factor, KronTerms, LowRank, transpose_factor

Range = tuple[int, int]  # first row, and one past the last row


def take_rows(terms: KronTerms, ranges: Sequence[Range]) -> KronTerms:
    """Return the rows of `ranges`, in that order, as a sum of Kronecker products.

    If B has b1 rows, ranges that start and end at multiples of b1 select rows of A. Otherwise B is split into blocks of
    g = gcd(b1, every start and end) rows, A ⊗ B = Σₘ (A ⊗ eₘ) ⊗ Bₘ, which has b1 / g times as many terms. If A has one
    row (a LoRA), the rows are rows of B. In DiffuseKronA's interleaved order, groups of a1 rows are rows of B; other
    ranges raise UnsupportedError.

    >>> terms = KronTerms(torch.rand(1, 2, 2), torch.rand(1, 6, 3))
    >>> part = take_rows(terms, [(4, 8)])
    >>> str(part.shape), part.terms, torch.allclose(part.dense(), terms.dense()[4:8])
    ('2x2 ⊗ 2x3', 3, True)
    """
    if terms.rows != "kron" and 1 not in terms.shape[::2]:
        return _interleaved_rows(terms, ranges)
    if terms.shape.a1 == 1:
        return replace(terms, rows="kron", right=_rows(terms.right, ranges))
    unit = gcd(terms.shape.b1, *(edge for r in ranges for edge in r))
    cut = cut_rows(terms, unit)
    return replace(cut, rows="kron", left=_rows(cut.left, [(a // unit, b // unit) for a, b in ranges]))


def _interleaved_rows(terms: KronTerms, ranges: Sequence[Range]) -> KronTerms:
    """Select interleaved rows: row i1·a1 + j1 is row j1·b1 + i1 of A ⊗ B, so the rows of one i1 are adjacent."""
    unit = terms.shape.a1
    if any(edge % unit for each in ranges for edge in each):
        raise UnsupportedError(
            "interleaved rows cannot be split at these positions.", fix="Convert the adapter to LoRA first (--to lora)."
        )
    return replace(terms, right=_rows(terms.right, [(start // unit, stop // unit) for start, stop in ranges]))


def transposed(terms: KronTerms) -> KronTerms:
    """Return ΔWᵀ = Σₖ Aₖᵀ ⊗ Bₖᵀ. Raises UnsupportedError for interleaved rows.

    >>> terms = KronTerms(torch.rand(2, 2, 5), torch.rand(2, 6, 3))
    >>> torch.equal(transposed(terms).dense(), terms.dense().mT)
    True
    """
    if terms.rows != "kron" and 1 not in terms.shape[::2]:
        raise UnsupportedError(
            "a sum with interleaved rows cannot be transposed.", fix="Convert the adapter to LoRA first (--to lora)."
        )
    return KronTerms(transpose_factor(terms.left), transpose_factor(terms.right))


def among_rows(terms: KronTerms, first: int, height: int) -> KronTerms:
    """Embed the sum at row `first` of a matrix of `height` rows that is zero elsewhere; the inverse of take_rows.

    If b1 divides `first` and `height`, A is padded with zero rows; for a single row of A (a LoRA), B is. Otherwise B is
    split into blocks of g = gcd(b1, first, height) rows, as in `take_rows`. In DiffuseKronA's interleaved order, A and
    B change places. Raises ShapeError if the matrix is too small.

    >>> terms = KronTerms(torch.rand(1, 2, 2), torch.rand(1, 3, 2))
    >>> tall = among_rows(terms, 6, 18)
    >>> str(tall.shape), torch.equal(tall.dense()[6:12], terms.dense()), int(tall.dense()[:6].count_nonzero())
    ('6x2 ⊗ 3x2', True, 0)
    >>> str(among_rows(terms, 2, 10).shape)
    '10x2 ⊗ 1x2'
    """
    out = terms.shape.full[0]
    if not 0 <= first <= height - out:
        raise ShapeError(
            f"rows {first} to {first + out} do not fit a matrix of {height} rows.",
            fix="Use the model that the adapter was made for.",
        )
    interleaved = terms.rows == "shuffled"
    outer, inner = (terms.right, terms.left) if interleaved else (terms.left, terms.right)
    outer, inner = _padded(outer, inner, first, height)
    return replace(terms, left=inner, right=outer) if interleaved else replace(terms, left=outer, right=inner)


def at_rows(terms: KronTerms, first: int, height: int) -> KronTerms:
    """Embed the sum as `among_rows` does, and keep a LoRA a LoRA: rows of zeros are added to its up.

    >>> lora = KronTerms(torch.ones(1, 1, 1), LowRank(torch.rand(1, 4, 2), torch.rand(1, 2, 5)))
    >>> at_rows(lora, 4, 12).shape, among_rows(lora, 4, 12).shape
    (KronShape(a1=1, a2=1, b1=12, b2=5), KronShape(a1=3, a2=1, b1=4, b2=5))
    """
    if terms.shape[:2] != (1, 1):
        return among_rows(terms, first, height)
    last = height - first - terms.shape.b1

    def padded(tensor: Tensor) -> Tensor:
        return pad(tensor, (0, 0, first, last))

    right = terms.right.map_sides(padded) if isinstance(terms.right, LowRank) else padded(terms.right)
    return KronTerms(terms.left, right)


def nonzero_terms(terms: KronTerms) -> KronTerms:
    """Return the sum without terms of which a stored factor is zero, perhaps without any term.

    >>> nonzero_terms(KronTerms(torch.eye(2)[:, :, None], torch.tensor([[[1.0]], [[0.0]]]))).terms
    1
    """
    used = torch.ones(terms.terms, dtype=torch.bool, device=terms.tensors[0].device)
    for tensor in terms.tensors:
        used &= (tensor != 0).flatten(1).any(1)
    return terms if bool(used.all()) else terms.map(lambda tensor: tensor[used])


def _padded(outer: Factor, inner: Factor, first: int, height: int) -> tuple[Factor, Factor]:
    """Pad the factor of the outer row index, after splitting the other one into blocks if necessary."""
    rows = inner.shape[1]
    unit = gcd(rows, first, height)
    if unit != rows and outer.shape[1] == 1:
        return outer, _with_zero_rows(inner, first, height)
    outer, inner = _cut_factors(outer, inner, rows // unit)
    return _with_zero_rows(outer, first // unit, height // unit), inner


def _with_zero_rows(factor: Factor, first: int, height: int) -> Factor:
    """Embed a factor: (terms, p, q) → (terms, height, q), zero outside of rows first to first + p."""
    if isinstance(factor, LowRank):
        return factor.map_sides(lambda up: _with_zero_rows_tensor(up, first, height))
    return _with_zero_rows_tensor(factor, first, height)


def _with_zero_rows_tensor(tensor: Tensor, first: int, height: int) -> Tensor:
    terms, p, q = tensor.shape
    tall = tensor.new_zeros(terms, height, q)
    tall[:, first : first + p] = tensor
    return tall


def cut_rows(terms: KronTerms, unit: int) -> KronTerms:
    """Split B into blocks of `unit` rows: (A ⊗ eₘ) ⊗ Bₘ for each block m, terms · b1/unit in total.

    >>> terms = KronTerms(torch.rand(1, 2, 2), torch.rand(1, 6, 3))
    >>> cut = cut_rows(terms, 2)
    >>> str(cut.shape), cut.terms, torch.equal(cut.dense(), terms.dense())
    ('6x2 ⊗ 2x3', 3, True)
    """
    left, right = _cut_factors(terms.left, terms.right, terms.shape.b1 // unit)
    return replace(terms, left=left, right=right)


def _cut_factors(outer: Factor, inner: Factor, blocks: int) -> tuple[Factor, Factor]:
    return (outer, inner) if blocks == 1 else (_spread(outer, blocks), _blocks(inner, blocks))


def _spread(factor: Factor, blocks: int) -> Factor:
    """Expand A: (terms, p, q) → (terms·blocks, p·blocks, q), where term k·blocks + m is factor[k] ⊗ eₘ."""
    if isinstance(factor, LowRank):
        return factor.map_sides(lambda up: _spread_tensor(up, blocks), lambda down: down.repeat_interleave(blocks, 0))
    return _spread_tensor(factor, blocks)


def _spread_tensor(tensor: Tensor, blocks: int) -> Tensor:
    unit = torch.eye(blocks, dtype=tensor.dtype, device=tensor.device)  # row m is eₘ
    return torch.einsum("kpq,ml->kmplq", tensor, unit).flatten(2, 3).flatten(0, 1)


def _blocks(factor: Factor, blocks: int) -> Factor:
    """Split B: (terms, p, q) → (terms·blocks, p/blocks, q), the row blocks of each term in order."""
    if isinstance(factor, LowRank):
        return factor.map_sides(lambda up: _blocks_tensor(up, blocks), lambda down: down.repeat_interleave(blocks, 0))
    return _blocks_tensor(factor, blocks)


def _blocks_tensor(tensor: Tensor, blocks: int) -> Tensor:
    return tensor.reshape(len(tensor) * blocks, -1, tensor.shape[2])


def _rows(factor: Factor, ranges: Sequence[Range]) -> Factor:
    if isinstance(factor, LowRank):
        return _without_unused(factor.map_sides(lambda up: _rows_tensor(up, ranges)))
    return _rows_tensor(factor, ranges)


def _without_unused(factor: LowRank) -> LowRank:
    """Drop the inner dimensions that these rows do not use, such as two thirds if q, k and v were fused."""
    if isinstance(factor, Hadamard):
        return Hadamard(_without_unused(factor.first), _without_unused(factor.second))
    used = (factor.up != 0).any(1).any(0)
    if bool(used.all()):
        return factor
    used[0] |= not bool(used.any())  # a product of zeros keeps rank 1
    return LowRank(factor.up[:, :, used], factor.down[:, used])


def _rows_tensor(tensor: Tensor, ranges: Sequence[Range]) -> Tensor:
    return torch.cat([tensor[:, start:stop] for start, stop in ranges], 1)
