"""One Kronecker term that equals several sums stacked by rows, such as q, k and v of a fused projection.

The inverse of `rows.take_rows`. Cut into blocks of a common number of rows, the unit g, all parts together are

    ΔW = Σₜ Aₜ ⊗ Bₜ     Aₜ: (height / g, a2), zero outside of the rows of its part     Bₜ: (g, b2)

With B of n·g rows, A[i, j] · B[block m] = Σₜ Aₜ[i·n + m, j] · Bₜ: ΔW is one term of that shape if R(ΔW) has rank 1.
In coordinates of an orthonormal basis of all Bₜ, R(ΔW) is small, because most Bₜ of different parts are equal; so every
n is tried, and ΔW is never formed. What was one term before it was cut gets its stored numbers back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.kron.hadamard import as_low_rank
from krona_hub.kron.rows import cut_rows
from krona_hub.kron.shapes import divisors
from krona_hub.kron.terms import Factor, KronTerms, LowRank, dense_factor, factor_tensors, map_factor, wide

SCREEN = 1e-5  # relative squared distance from rank 1 beyond which a shape is rejected, well above any rounding
NEARBY = 4  # rows of A on either side of the one with the largest entry, which reject most shapes
INDEPENDENT = 1e-6  # relative squared distance of a vector from the span of others: Cholesky keeps enough digits
NEAR_ONE = 1e-12  # float64 coefficients this near to 1 are 1, so that they change no stored number
ALIKE = 1e-6  # relative distance from A up to which a column of stored numbers replaces it
OVERSAMPLED = 8  # random vectors beyond the rank, for the range of a low-rank matrix

Part = tuple[int, Sequence[KronTerms]]  # first row, and the sums of the rows from there


def as_single_term(parts: Sequence[Part], height: int) -> KronTerms | None:
    """Return the one term A ⊗ B of `height` rows that equals the parts at their rows, zero elsewhere; None without one.

    Equal means within a few units of rounding of the widest dtype, at least float32. Low-rank factors stay low-rank. If
    several shapes are possible, the one with the fewest values is chosen.

    >>> from krona_hub.kron.rows import take_rows
    >>> one = KronTerms(torch.rand(1, 2, 2), torch.rand(1, 6, 3))  # 12 rows: q, k and v of 4 rows cut B
    >>> parts = [(first, [take_rows(one, [(first, first + 4)])]) for first in (0, 4, 8)]
    >>> again = as_single_term(parts, 12)
    >>> parts[0][1][0].terms, torch.equal(again.left, one.left), torch.equal(again.right, one.right)
    (3, True, True)
    """
    sums = [(first, replace(s, rows="kron")) for first, each in parts for s in each if _changes(s)]
    shuffled = any(s.rows != "kron" and 1 not in s.shape[::2] for _, each in parts for s in each)
    if shuffled or len({s.shape[1::2] for _, s in sums}) > 1:
        return None
    if not sums:
        return _zero([s for _, each in parts for s in each], height)
    unit = gcd(height, *(n for first, s in sums for n in (first, s.shape.b1)))
    stack = _stacked([(first, cut_rows(s, unit)) for first, s in sums], height)
    a2, b2 = sums[0][1].shape[1::2]
    heights = sorted(divisors(height // unit), key=lambda n: height // (n * unit) * a2 + n * unit * b2)
    found = (_with_blocks(stack, n) for n in heights)
    return next((term for term in found if term is not None), None)


def _changes(s: KronTerms) -> bool:
    """Whether a sum may differ from zero: no factor of it is zero."""
    return all(bool(dense_factor(factor).any()) for factor in (s.left, s.right))


def _zero(sums: Sequence[KronTerms], height: int) -> KronTerms | None:
    """Return a term of zeros, with columns split as those of the first sum."""
    if not sums:
        return None
    unit, (_, a2, _, b2) = gcd(height, sums[0].shape.b1), sums[0].shape
    return KronTerms(torch.zeros(1, height // unit, a2), torch.zeros(1, unit, b2))


class Cut(NamedTuple):
    """One term Aₜ ⊗ Bₜ of a part, with Bₜ = coefficient · rights[right]."""

    first: int  # block of the whole, counted in units of rows
    left: Factor  # (1, rows / unit, a2)
    right: int
    coefficient: float


@dataclass(frozen=True)
class Stack:
    """All parts, in coordinates of their different right factors and of an orthonormal basis of these."""

    cuts: Sequence[Cut]
    rights: Sequence[Factor]  # each (1, unit, b2)
    coordinates: Tensor  # (height / unit, a2, rights)
    orthonormal: Tensor  # (height / unit, a2, basis), coordinates @ basis.mT
    basis: Tensor  # (basis, rights): the rights in the orthonormal basis
    squares: Tensor  # (height / unit, a2): the sum of squares of the rows of `orthonormal`
    tolerance: float

    @property
    def norm(self) -> float:
        """‖ΔW‖."""
        return float(self.squares.sum().sqrt())


class Rights:
    """The different right factors, up to multiples, each as stored where it came first."""

    def __init__(self) -> None:
        self.factors: list[Factor] = []
        self.rows: list[Tensor] = []  # the values of each, in float64
        self._sizes: list[float] = []  # the largest value of each
        self._as_stored: dict[tuple[tuple[torch.dtype, bytes], ...], tuple[int, float]] = {}
        self._directions: dict[tuple[int, bytes], int] = {}

    def number_of(self, factor: Factor) -> tuple[int, float]:
        """Return n and c with factor = c · factors[n], exact in float64; c = 0 for zeros."""
        key = tuple((t.dtype, _bytes(t)) for t in factor_tensors(factor))  # q, k and v have copies: skip their products
        if key not in self._as_stored:
            self._as_stored[key] = self._added(factor)
        return self._as_stored[key]

    def _added(self, factor: Factor) -> tuple[int, float]:
        row = _double(factor).flatten()
        largest = int(row.abs().argmax())
        size = float(row[largest])
        if not size:
            return 0, 0.0
        key = largest, _bytes(row / size + 0.0)  # -0.0 + 0.0 is 0.0
        number = self._directions.setdefault(key, len(self.factors))
        if number == len(self.factors):
            self.factors.append(factor)
            self.rows.append(row)
            self._sizes.append(size)
        return number, size / self._sizes[number]


def _bytes(tensor: Tensor) -> bytes:
    data: bytes = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return data


def _stacked(sums: Sequence[tuple[int, KronTerms]], height: int) -> Stack:
    unit, a2 = sums[0][1].shape.b1, sums[0][1].shape.a2
    rights = Rights()
    cuts = [
        Cut(first // unit, _nth(s.left, k), *rights.number_of(_nth(s.right, k)))
        for first, s in sums
        for k in range(s.terms)
    ]
    cuts = [cut for cut in cuts if cut.coefficient]
    coordinates = torch.zeros(height // unit, a2, len(rights.factors), dtype=torch.float64)
    for cut in cuts:
        coordinates[cut.first :][: cut.left.shape[1], :, cut.right] += _double(cut.left)[0] * cut.coefficient
    basis = _triangular(torch.stack(rights.rows))
    orthonormal, tolerance = coordinates @ basis.mT, _tolerance([s for _, s in sums])
    return Stack(cuts, rights.factors, coordinates, orthonormal, basis, orthonormal.square().sum(2), tolerance)


def _triangular(rows: Tensor) -> Tensor:
    """Return vectors in an orthonormal basis of their span, (basis, n): by Cholesky if independent, else by QR.

    From Cholesky, the basis is orthonormal to a few digits only, which suffices to measure errors.
    """
    gram = rows @ rows.mT
    lower, failed = torch.linalg.cholesky_ex(gram)
    sizes = lower.diagonal().square() / gram.diagonal()  # of the part of each row outside of the span of those before
    if not int(failed) and float(sizes.min()) > INDEPENDENT:
        return torch.as_tensor(lower.mT)
    return torch.as_tensor(torch.linalg.qr(rows.mT, mode="r").R)


def _nth(factor: Factor, k: int) -> Factor:
    return map_factor(lambda tensor: tensor[k : k + 1], factor)


def _double(factor: Factor) -> Tensor:
    return dense_factor(map_factor(Tensor.double, factor))


def _tolerance(sums: Sequence[KronTerms]) -> float:
    """Return a few units of rounding, relative: of float64 if every number has it, else of float32."""
    stored = {t.dtype for s in sums for t in s.tensors}
    return 512 * torch.finfo(torch.float64).eps if stored == {torch.float64} else 8 * torch.finfo(torch.float32).eps


def _with_blocks(stack: Stack, blocks: int) -> KronTerms | None:
    """Return the term whose B has so many blocks of rows, None unless R(ΔW) of that shape has rank 1."""
    whole = _in_blocks(stack.orthonormal, blocks)  # (a1, blocks, a2, basis)
    size = stack.squares.reshape(-1, blocks, whole.shape[2]).sum(1)  # (a1, a2), of each row of R(ΔW)
    i, j = divmod(int(size.argmax()), size.shape[1])
    largest = whole[i, :, j]  # (blocks, basis)
    for rows in (slice(max(0, i - NEARBY), i + NEARBY + 1), slice(None)):
        left = torch.einsum("imjs,ms->ij", whole[rows], largest) / size[i, j]
        if float(size[rows].sum() - left.square().sum() * size[i, j]) > SCREEN * float(size.sum()):
            return None
    coordinates = _in_blocks(stack.coordinates, blocks)  # (a1, blocks, a2, rights)
    left, column = _stored_column(coordinates, left)
    weights = torch.einsum("imjs,ij->ms", coordinates, left) / left.square().sum()
    weights = torch.where((weights - 1).abs() <= NEAR_ONE, 1.0, weights)
    error = whole - torch.einsum("ij,ms->imjs", left, weights @ stack.basis.mT)
    if not float(torch.linalg.vector_norm(error)) <= stack.tolerance * stack.norm:
        return None
    return KronTerms(_left(stack, left, blocks, column), _right(stack, weights))


def _in_blocks(rows: Tensor, blocks: int) -> Tensor:
    """(height / unit, a2, n) -> (a1, blocks, a2, n)."""
    return rows.reshape(-1, blocks, *rows.shape[1:])


def _stored_column(coordinates: Tensor, left: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
    """Return A as the largest column of coordinates, which has the stored numbers, and its (block, right).

    If the right factors depend on one another, a column need not be a multiple of A: then return `left` and None.
    """
    size = coordinates.square().sum((0, 2))  # (blocks, rights)
    m, s = divmod(int(size.argmax()), size.shape[1])
    column = coordinates[:, m, :, s]
    scale = float((column * left).sum() / left.square().sum())
    distance = float(torch.linalg.vector_norm(column - scale * left))
    if distance > ALIKE * float(torch.linalg.vector_norm(column)):
        return left, None
    return column, (m, s)


def _left(stack: Stack, matrix: Tensor, blocks: int, column: tuple[int, int] | None) -> Factor:
    """Return A (1, a1, a2): the rows of the cuts that form its column, as stored, or `matrix`."""
    pieces = []
    for cut in stack.cuts:
        if column is not None and cut.right == column[1]:
            start = (column[0] - cut.first) % blocks  # the first row of the cut that is in this block
            row = (cut.first + start) // blocks
            pieces.append(Block(row, cut.left, cut.coefficient, slice(start, None, blocks)))
    return _joined(pieces, len(matrix), [cut.left for cut in stack.cuts], matrix)


def _right(stack: Stack, weights: Tensor) -> Factor:
    """Return B (1, b1, b2): block m is the sum of weights[m, s] · right s."""
    unit = stack.rights[0].shape[1]
    pieces = [
        Block(m * unit, right, float(weight))
        for m, row in enumerate(weights)
        for right, weight in zip(stack.rights, row, strict=True)
        if weight != 0
    ]
    return _joined(pieces, len(weights) * unit, stack.rights)


# --- factors of row blocks -------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """`weight` times some rows of a factor (1, p, q), from row `first` of the whole."""

    first: int
    factor: Factor
    weight: float = 1.0
    rows: slice = slice(None)


def _joined(blocks: Sequence[Block], height: int, factors: Sequence[Factor], matrix: Tensor | None = None) -> Factor:
    """Return the sum (1, height, q) of blocks, which are zero outside of their rows; without blocks, `matrix`.

    If all `factors` are low-rank products, the result is one too, of the blocks' own numbers unless their rank is not
    the lowest. Numbers that no weight changes keep their dtype; others are at least float32.
    """
    products = [as_low_rank(factor) for factor in factors if isinstance(factor, LowRank)]
    are_low_rank = len(products) == len(factors)
    most = max((product.rank for product in products), default=0)
    united = _united(blocks, height) if blocks and are_low_rank else None
    if united is not None and united.rank <= most:
        return united
    dense = _dense(blocks, height) if matrix is None else matrix
    product = _as_product(dense, most if united is None else united.rank - 1) if are_low_rank else None
    if product is not None:
        dtype = torch.promote_types(_widest([t for f in products for t in f.tensors]), torch.float32)
        return product.map(lambda tensor: tensor.to(dtype))
    return _as_stored(dense, factors)[None] if united is None else united


def _united(blocks: Sequence[Block], height: int) -> LowRank | None:
    """Return the blocks as one product, whose rank is the number of different rows of their `down`."""
    numbers: dict[tuple[int, bytes], int] = {}  # how often this row occurred before in its factor, and its bytes
    downs: list[Tensor] = []
    columns: list[tuple[int, list[int], Tensor]] = []
    for block in blocks:
        if not isinstance(block.factor, LowRank):
            return None
        product = as_low_rank(block.factor)
        own: list[int] = []
        for row in product.down[0]:
            data = row.double().numpy().tobytes()
            key = next((n, data) for n in range(len(own) + 1) if numbers.get((n, data)) not in own)
            if key not in numbers:
                numbers[key] = len(downs)
                downs.append(row)
            own.append(numbers[key])
        up = product.up[0, block.rows]
        columns.append((block.first, own, up if block.weight == 1 else wide(up) * block.weight))
    dtype = _widest([up for _, _, up in columns])
    up = torch.zeros(1, height, len(downs), dtype=dtype)
    for first, own, own_up in columns:
        up[0, first : first + len(own_up), own] += own_up.to(dtype)
    dtype = _widest(downs)
    return LowRank(up, torch.stack([row.to(dtype) for row in downs])[None])


def _dense(blocks: Sequence[Block], height: int) -> Tensor:
    """Return the sum of the blocks, (height, q), in float64."""
    whole = torch.zeros(height, blocks[0].factor.shape[2], dtype=torch.float64)
    for block in blocks:
        rows = dense_factor(map_factor(Tensor.double, block.factor))[0, block.rows]
        whole[block.first : block.first + len(rows)] += block.weight * rows
    return whole


def _as_product(matrix: Tensor, most: int) -> LowRank | None:
    """Return a float64 matrix as a product of its own rank, from the range of random vectors; None if above `most`."""
    most = min(most, *matrix.shape)
    random = torch.Generator().manual_seed(0)
    probes = torch.randn(matrix.shape[1], most + OVERSAMPLED, generator=random, dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ probes).Q
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    rank = max(1, int((s > torch.finfo(torch.float32).eps * s[0]).sum()))
    up, down = basis @ u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * vh[:rank]
    error, size = torch.linalg.vector_norm(matrix - up @ down), torch.linalg.vector_norm(matrix)
    return LowRank(up[None], down[None]) if rank <= most and error <= torch.finfo(torch.float32).eps * size else None


def _as_stored(matrix: Tensor, factors: Sequence[Factor]) -> Tensor:
    """Cast float64 to the widest dtype of the factors if no number changes, otherwise to float32 at least."""
    dtype = _widest([t for factor in factors for t in factor_tensors(factor)])
    small = matrix.to(dtype)
    return small if torch.equal(small.double(), matrix) else matrix.to(torch.promote_types(dtype, torch.float32))


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
