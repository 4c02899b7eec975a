"""Upper bounds of the energy that a factorization of a layer retains, without computing it.

For a layer of energy ‖ΔW‖² = 1 and one shape, the search needs upper bounds of the energy of K terms, Σₖ≤ₖ σₖ(R)², and
of right factors of total rank q. All of them use spectra per divisor of out and of in, and none uses R:

    mode spectra    ΔW as a tensor (a1, b1, a2, b2) has four modes. K terms of rank ρ have at most rank K·ρ in the
                    modes b1 and b2, K·min(a1, a2) in a1 and a2, and K·ρ·min(a1, a2) as a matrix: they retain at
                    most that many leading values (Eckart & Young).
    products        R = [tᵢUᵢ ⊗ I]ᵢ · [I ⊗ tᵢ'Vᵢ]ᵢ with tᵢ·tᵢ' = sᵢ, so Σσₖ² ≤ Σ xₖ·yₖ of the squared singular values of
                    the two (Horn 1950), each a mode spectrum repeated.
    fourth moment   Σσ⁴ = ‖R Rᵀ‖² = ⟨M(U), M(V)⟩ with one r²×r² table per divisor; K of M values of sum 1 then
                    sum to K/M + √(K(M−K)/M · (Σσ⁴ − 1/M)) at most.

The second is tighter than the bound σ₁(R) ≤ Σ sᵢ σ₁(Uᵢ) σ₁(Vᵢ) of the triangle inequality by an order of magnitude if
the directions of a LoRA are unrelated, which is when shapes must be ruled out.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from krona_hub.kron.rearrangement import LoraSvd
from krona_hub.kron.shapes import KronShape

SLACK = {torch.float32: 2e-5, torch.float64: 1e-9}  # error of a spectrum, as a fraction of the energy
SLACK_OF_MOMENT = 1e-4  # relative: moments are summed in float32
MOST_RANK = 24  # above this rank the r²×r² tables of moments cost more than they save
SHARE = 0.5  # tᵢ = sᵢ to this power; others are rarely tighter, and cost a spectrum of every mode


class Bounds:
    """Bounds for n layers of one size, in the dtype of their SVD; spectra are computed on first use."""

    def __init__(self, lora: LoraSvd) -> None:
        self.s = lora.s / lora.s.norm(dim=1, keepdim=True)  # (n, r), energy 1
        self._left, self._right = lora.u.mT, lora.vh
        self._spectra: dict[tuple[str, int, float], Tensor] = {}
        self._tails: dict[tuple[str, int], Tensor] = {}
        self._moments: dict[tuple[str, int], Tensor] = {}

    @property
    def rank(self) -> int:
        return int(self.s.shape[1])

    @property
    def slack(self) -> float:
        return SLACK[self.s.dtype]

    @cached_property
    def lora_tail(self) -> Tensor:
        """(n, r+1): the energy outside of a LoRA of rank 0 … r."""
        return tail(self.s.square())

    def kept_by_terms(self, shape: KronShape, terms: int, layers: Tensor) -> Tensor:
        """Bound the energy of 1 … terms products of this shape from above: (len(layers), terms)."""
        k = torch.arange(terms)
        kept = self._kept_by_products(shape, k, layers)
        for mode, size in (("a1", shape.a1), ("a2", shape.a2)):
            left = self._tail(mode, size)[layers]
            reach = ((k + 1) * min(shape.a1, shape.a2)).clamp(max=left.shape[1] - 1)
            kept = torch.minimum(kept, 1 - left[:, reach])
        return kept.double() + self.slack

    def left_by_ranks(self, shape: KronShape, total: int, layers: Tensor) -> Tensor:
        """Bound the residual energy of right factors of total rank 1 … total from below: (len(layers), total)."""
        q = torch.arange(1, total + 1)
        left = self.lora_tail[layers][:, (q * min(shape.a1, shape.a2)).clamp(max=self.rank)]
        for mode, size in (("b1", shape.b1), ("b2", shape.b2)):
            by_mode = self._tail(mode, size)[layers]
            left = torch.maximum(left, by_mode[:, q.clamp(max=by_mode.shape[1] - 1)])
        return left.double() - self.slack

    def kept_by_moment(self, shape: KronShape, terms: int, layers: Tensor) -> Tensor:
        """Bound the energy of 1 … terms products from above by the fourth moment: (len(layers), terms)."""
        count = _most_terms(shape, self.rank)
        if self.rank > MOST_RANK:
            return torch.ones(len(layers), terms, dtype=torch.float64)
        fourth = (self._moment("left", shape.a1)[layers] * self._moment("right", shape.a2)[layers]).sum(1)
        return largest_sums(fourth.double() * (1 + SLACK_OF_MOMENT), count, terms) + self.slack

    def _kept_by_products(self, shape: KronShape, k: Tensor, layers: Tensor) -> Tensor:
        """Σ xₖ·yₖ, the smaller of the two factorizations of R."""
        x, y = self._spectrum("a1", shape.a1, SHARE)[layers], self._spectrum("b2", shape.b2, 1 - SHARE)[layers]
        one = (repeated(x, k // shape.a2) * repeated(y, k // shape.b1)).cumsum(1)
        x, y = self._spectrum("a2", shape.a2, SHARE)[layers], self._spectrum("b1", shape.b1, 1 - SHARE)[layers]
        return torch.minimum(one, (repeated(x, k // shape.a1) * repeated(y, k // shape.b2)).cumsum(1))

    def _tail(self, mode: str, size: int) -> Tensor:
        """Energy outside of the leading values of one mode of ΔW: (n, j+1)."""
        key = mode, size
        if key not in self._tails:
            self._tails[key] = tail(self._spectrum(mode, size, 1.0))
        return self._tails[key]

    def _spectrum(self, mode: str, size: int, share: float) -> Tensor:
        """Squared singular values of one mode of the left (a1, b1) or right (a2, b2) vectors times s^share."""
        key = mode, size, share
        if key not in self._spectra:
            self._spectra[key] = self._compute_spectrum(*key)
        return self._spectra[key]

    def _compute_spectrum(self, mode: str, size: int, share: float) -> Tensor:
        vectors = (self._left if mode[1] == "1" else self._right) * self.s[..., None] ** share
        n, rank, length = vectors.shape
        if mode[0] == "a":  # slow index
            matrix = vectors.reshape(n, rank, size, length // size).transpose(1, 2).reshape(n, size, -1)
        else:  # fast index
            matrix = vectors.reshape(n, rank * (length // size), size).mT
        gram = matrix @ matrix.mT if size <= matrix.shape[2] else matrix.mT @ matrix
        values: Tensor = torch.linalg.eigvalsh(gram)
        return values.flip(-1).clamp(min=0)

    def _moment(self, side: str, size: int) -> Tensor:
        key = side, size
        if key not in self._moments:
            if side == "left":  # shapes are ordered by a1: earlier tables are not needed again
                self._moments = {k: table for k, table in self._moments.items() if k[0] == "right"}
            vectors = self._left * self.s[..., None] if side == "left" else self._right
            self._moments[key] = fourth_moment(vectors.float(), size)
        return self._moments[key]


def tail(values: Tensor) -> Tensor:
    """Return what remains of the sum after the first 0 … j values: (n, j), descending -> (n, j+1)."""
    rest = values.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([rest, rest.new_zeros(len(rest), 1)], dim=1)


def largest_sums(squares: Tensor, count: int, most: int) -> Tensor:
    """Bound the sums of the largest 1 … most of `count` values of sum 1, given their sum of squares: (…, most)."""
    k = torch.arange(1, most + 1).clamp(max=count).double()
    spread = (squares - 1 / count).clamp(min=0)[..., None]
    sums: Tensor = k / count + (k * (count - k) / count * spread).sqrt()
    return sums


def repeated(values: Tensor, index: Tensor) -> Tensor:
    """Return values[:, index], and zero beyond their end."""
    return torch.where(index < values.shape[1], values[:, index.clamp(max=values.shape[1] - 1)], 0.0)


def fourth_moment(vectors: Tensor, size: int) -> Tensor:
    """Return tr(Mⱼ Mᵢᵀ Mₖ Mₗᵀ) for all i, j, k, l; Mᵢ = vectors[:, i] as (size, rest): (n, r, length) -> (n, r⁴)."""
    n, rank, length = vectors.shape
    rest = length // size
    if size <= rest:  # from Mᵢ Mⱼᵀ, (size, size)
        flat = vectors.reshape(n, rank * size, rest)
        table = (flat @ flat.mT).reshape(n, rank, size, rank, size).permute(0, 2, 4, 1, 3)
        table = table.reshape(n, size * size, rank * rank)
        return (table.mT @ table).reshape(n, -1)
    flat = vectors.reshape(n, rank, size, rest).transpose(1, 2).reshape(n, size, rank * rest)
    table = (flat.mT @ flat).reshape(n, rank, rest, rank, rest).permute(0, 2, 4, 1, 3)  # from Mᵢᵀ Mₖ, (rest, rest)
    table = table.reshape(n, rest * rest, rank * rank)
    return (table.mT @ table).reshape(n, rank, rank, rank, rank).transpose(2, 3).reshape(n, -1)


def _most_terms(shape: KronShape, rank: int) -> int:
    """Number of singular values of R that can be nonzero."""
    a1, b1 = min(shape.a1, rank * shape.b1), min(shape.b1, rank * shape.a1)
    a2, b2 = min(shape.a2, rank * shape.b2), min(shape.b2, rank * shape.a2)
    return min(a1 * a2, b1 * b2)
