"""The candidate factorizations of a LoRA layer, each with its size and its error.

A factorization is a shape, a number of terms K, and either dense right factors or right factors of one rank ρ:

    ΔW ≈ Σₖ Aₖ ⊗ Bₖ     Aₖ, Bₖ from the K largest singular triples of R(ΔW), each Bₖ cut to rank ρ by its SVD

Because the vec(Aₖ) are orthonormal, the squared error is ‖ΔW‖² − Σₖ σₖ² Σⱼ≤ρ sₖⱼ², where sₖⱼ are the singular values of
the unit-norm Bₖ: one set of triples gives the errors of all factorizations of a shape. With A = [[1]] and a rank ρ the
factorization is the LoRA itself, complete or truncated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.kron.krylov import Triples, top_triples
from krona_hub.kron.rearrangement import LoraSvd, Rearranged
from krona_hub.kron.shapes import KronShape
from krona_hub.kron.terms import Factor, KronFit, KronTerms, LowRank, as_lora

ROUNDING = 1e-12  # relative error up to which factorizations are equal up to rounding
CANCELLED = 1e-8  # squared relative error below which 1 − Σσ² has too few digits left
AT_ONCE = 1 << 23  # values of right factors in memory at once: 64 MiB of float64


@dataclass(frozen=True)
class Factorization:
    """The factorization of one layer: shape, terms and rank, with its size and its error."""

    shape: KronShape
    terms: int
    right_rank: int | None  # rank of every B; None for dense B
    parameters: int  # stored values; a constant A = [[1]] does not count
    relative_error: float  # ‖ΔW − factorization‖ / ‖ΔW‖, Frobenius norm

    @property
    def energy(self) -> float:
        """The retained energy, as a share of ‖ΔW‖²."""
        return 1 - self.relative_error**2

    @property
    def is_lora(self) -> bool:
        """Whether this is the LoRA itself, complete or truncated, whatever its shape."""
        return is_lora(self.shape, self.right_rank)

    @property
    def is_nothing(self) -> bool:
        """Whether the layer is left out: no terms, no parameters, all of its energy lost."""
        return self.terms == 0

    @property
    def order(self) -> tuple[int, bool, int, KronShape, int]:
        """Sort key: fewer parameters first; at equal size the LoRA itself, then fewer terms, then smaller shapes."""
        return self.parameters, not self.is_lora, self.terms, self.shape, self.right_rank or 0

    def __str__(self) -> str:
        if self.is_nothing:
            return "left out"
        if self.is_lora:
            return f"LoRA of rank {self.right_rank or self.terms}"
        return f"{self.terms} × {self.shape}" + (f", B of rank {self.right_rank}" if self.right_rank else "")


def nothing(size: tuple[int, int]) -> Factorization:
    """Return the factorization of a layer of that (out, in) that is left out.

    >>> nothing((320, 768)).parameters, nothing((320, 768)).relative_error, str(nothing((320, 768)))
    (0, 1.0, 'left out')
    """
    return Factorization(KronShape(1, 1, *size), 0, None, 0, 1.0)


def is_lora(shape: KronShape, right_rank: int | None) -> bool:
    """Return whether a factorization is a LoRA: [[1]] ⊗ (up·down), or (out, 1) ⊗ (1, in) and its mirror image."""
    if shape.a1 == shape.a2 == 1:
        return right_rank is not None  # a dense B is the matrix itself
    return shape.a2 == shape.b1 == 1 or shape.a1 == shape.b2 == 1


def parameters_of(shape: KronShape, terms: int, right_rank: int | None) -> int:
    """Return the number of values that a factorization stores.

    >>> parameters_of(KronShape(64, 8, 20, 160), 2, None), parameters_of(KronShape(64, 8, 20, 160), 2, 4)
    (7424, 2464)
    >>> parameters_of(KronShape(1, 1, 1280, 1280), 1, 16)
    40960
    """
    a, b1, b2 = shape.a1 * shape.a2, shape.b1, shape.b2
    right = b1 * b2 if right_rank is None else right_rank * (b1 + b2)
    return terms * (right + (a if a > 1 else 0))


def most_right_rank(shape: KronShape) -> int:
    """Return the largest rank at which low-rank right factors are smaller than dense ones; 0 if there is none.

    Also 0 for A = [[1]]: that is the LoRA itself, whose errors need no search.
    """
    return 0 if shape.a1 == shape.a2 == 1 else (shape.b1 * shape.b2 - 1) // (shape.b1 + shape.b2)


class FactorizationSpectrum(NamedTuple):
    """Retained energy of all factorizations of one shape with up to K terms, for n layers with ‖ΔW‖ = 1."""

    kept: Tensor  # (n, K): energy of 1 … K terms with dense B
    kept_by_rank: Tensor  # (n, K, ρ): energy of 1 … K terms with B of rank 1 … ρ
    triples: Triples
    op: Rearranged

    def error(self, layer: int, terms: int, right_rank: int | None) -> float:
        """Return the relative error of one factorization, exact even if it is far below the square root of rounding."""
        kept = (
            self.kept if right_rank is None else self.kept_by_rank[..., min(right_rank, self.kept_by_rank.shape[2]) - 1]
        )
        left = 1 - float(kept[layer, min(terms, kept.shape[1]) - 1])
        return left**0.5 if left > CANCELLED else self._measured(layer, terms, right_rank)

    def _measured(self, layer: int, terms: int, right_rank: int | None) -> float:
        one = torch.tensor([layer])
        right = self.triples.right[one, :terms] * self.triples.sigma[one, :terms, None]
        if right_rank is not None:
            up, down = cut(right.reshape(terms, *self.op.columns), right_rank)
            right = (up @ down).reshape(1, terms, -1)
        return float(self.op.take(one).residual(self.triples.left[one, :terms], right))


def spectrum(lora: LoraSvd, shape: KronShape, terms: int, ranks: bool = True) -> FactorizationSpectrum:
    """Compute the spectrum of n layers of unit norm; `ranks` are optional, as they cost a decomposition per term."""
    op = Rearranged.of(lora, shape)
    triples = top_triples(op, terms)
    energy = triples.sigma.square()
    by_rank = energy[..., None] * shares_by_rank(op, triples.right, shape) if ranks else energy.new_zeros(0, 0, 0)
    return FactorizationSpectrum(energy.cumsum(1), by_rank.cumsum(1), triples, op)


def shares_by_rank(op: Rearranged, right: Tensor, shape: KronShape) -> Tensor:
    """Return the energy of ranks 1 … ρ of each unit-norm right factor: (n, k, b1'·b2') -> (n, k, ρ)."""
    n, k, _ = right.shape
    most = min(most_right_rank(shape), *op.columns)
    if not most:
        return right.new_zeros(n, k, 0)
    stack = right.reshape(n * k, *op.columns)
    gram = stack @ stack.mT if stack.shape[1] <= stack.shape[2] else stack.mT @ stack
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(-1)[:, :most].clamp(min=0).cumsum(1).reshape(n, k, most)


def cut(stack: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncate matrices (…, p, q) to `rank`, as up (…, p, rank) and down (…, rank, q) that share each σ evenly."""
    u, s, vh = torch.linalg.svd(stack, full_matrices=False)
    root = s[..., :rank].sqrt()
    return u[..., :rank] * root[..., None, :], root[..., None] * vh[..., :rank, :]


def realize(up: Tensor, down: Tensor, form: Factorization) -> KronFit:
    """Factorize the layer up·down as `form`, and measure its error; the result is at least float32.

    A LoRA that keeps its rank is returned unchanged.
    """
    dtype = torch.promote_types(torch.promote_types(up.dtype, down.dtype), torch.float32)
    if form.shape[:2] == (1, 1) and form.right_rank is not None:
        return _as_lora_of_rank(up, down, form.right_rank, dtype)
    lora = LoraSvd.of(up[None], down[None])
    whole = float(lora.s.norm())
    unit = replace(lora, s=lora.s / (whole or 1.0))
    found = spectrum(unit, form.shape, form.terms, ranks=form.right_rank is not None)
    left, right = found.op.lift(found.triples.left, found.triples.right)
    root = (found.triples.sigma[0] * whole).sqrt()[:, None, None]
    a, b = left[0] * root, right[0] * root
    factor: Factor = (
        b.to(dtype) if form.right_rank is None else LowRank(*(x.to(dtype) for x in cut(b, form.right_rank)))
    )
    error = found.error(0, len(a), form.right_rank) if whole else 0.0
    return KronFit(KronTerms(a.to(dtype), factor), error)


def _as_lora_of_rank(up: Tensor, down: Tensor, rank: int, dtype: torch.dtype) -> KronFit:
    if rank >= up.shape[1]:
        return KronFit(as_lora(up, down), 0.0)
    lora = LoraSvd.of(up[None], down[None])
    s, root = lora.s[0], lora.s[0, :rank].sqrt()
    error = float(s[rank:].norm() / s.norm()) if float(s[0]) else 0.0
    return KronFit(
        as_lora((lora.u[0, :, :rank] * root).to(dtype), (root[:, None] * lora.vh[0, :rank]).to(dtype)), error
    )
