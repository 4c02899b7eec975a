"""R(up·down) as an operator: products with R and its Gram matrix, without forming ΔW or R.

    R(up·down) = Σᵢ Uᵢ ⊗ Vᵢ     Uᵢ = mat(up[:, i]): (a1, b1)     Vᵢ = mat(down[i, :]): (a2, b2)     R: (a1·a2, b1·b2)

Each of the four modes that is longer than its rank allows (for example a1 > r·b1) is first reduced to coordinates in an
orthonormal basis by a QR, which preserves the singular values of R: for a LoRA of rank 16 and A of 1280x1, R is only a
16x16 matrix. Everything is batched over layers of one size, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from krona_hub.kron.shapes import KronShape
from krona_hub.kron.to_lora import compact_svd

BLOCK = 1 << 22  # values of R in memory at once when blocks are formed: 32 MiB of float64


@dataclass(frozen=True, eq=False)
class LoraSvd:
    """The SVD of n LoRAs of one size, in float64, from which all factorizations are computed."""

    u: Tensor  # (n, out, r)
    s: Tensor  # (n, r), descending; a layer of lower rank has zeros at the end
    vh: Tensor  # (n, r, in)

    @classmethod
    def of(cls, ups: Tensor, downs: Tensor) -> LoraSvd:
        """Compute the SVD of ups (n, out, r) and downs (n, r, in); drops directions that are zero in every layer."""
        u, s, vh = compact_svd(ups, downs)
        rank = max(1, int((s > torch.finfo(s.dtype).eps * s[:, :1]).sum(1).max()))
        return cls(u[..., :rank].contiguous(), s[:, :rank].contiguous(), vh[:, :rank].contiguous())

    @property
    def size(self) -> tuple[int, int]:
        return self.u.shape[1], self.vh.shape[2]

    def to(self, dtype: torch.dtype) -> LoraSvd:
        return LoraSvd(self.u.to(dtype), self.s.to(dtype), self.vh.to(dtype))

    def take(self, layers: Tensor) -> LoraSvd:
        return LoraSvd(self.u[layers], self.s[layers], self.vh[layers])


@dataclass(frozen=True, eq=False)
class Rearranged:
    """R of n layers for one shape, in reduced coordinates (marked ' below)."""

    u: Tensor  # (n, r, a1', b1'), scaled by the singular values of the LoRA
    v: Tensor  # (n, r, a2', b2')
    modes: tuple[Tensor | None, ...] = (None,) * 4  # (n, a1, a1'), (n, a2, a2'), (n, b1, b1'), (n, b2, b2')

    @classmethod
    def of(cls, lora: LoraSvd, shape: KronShape) -> Rearranged:
        n, rank = lora.s.shape
        u = (lora.u * lora.s[:, None]).mT.reshape(n, rank, shape.a1, shape.b1)
        v = lora.vh.reshape(n, rank, shape.a2, shape.b2)
        u, mode_a1 = _reduce_mode(u)
        v, mode_a2 = _reduce_mode(v)
        ut, mode_b1 = _reduce_mode(u.mT)
        vt, mode_b2 = _reduce_mode(v.mT)
        return cls(ut.mT, vt.mT, (mode_a1, mode_a2, mode_b1, mode_b2))

    @property
    def rows(self) -> tuple[int, int]:
        """(a1', a2')"""
        return self.u.shape[2], self.v.shape[2]

    @property
    def columns(self) -> tuple[int, int]:
        """(b1', b2')"""
        return self.u.shape[3], self.v.shape[3]

    @property
    def count(self) -> int:
        return len(self.u)

    @property
    def device(self) -> torch.device:
        return self.u.device

    @property
    def shape(self) -> tuple[int, int]:
        """The size of R in reduced coordinates."""
        return self.rows[0] * self.rows[1], self.columns[0] * self.columns[1]

    @cached_property
    def T(self) -> Rearranged:
        """Rᵀ: the two factors of the Kronecker product are swapped."""
        a1, a2, b1, b2 = self.modes
        return Rearranged(self.u.mT.contiguous(), self.v.mT.contiguous(), (b1, b2, a1, a2))

    @cached_property
    def _wide_u(self) -> Tensor:
        """[U₁ U₂ …] side by side: (n, a1', r·b1'). Cached, since thousands of products use it."""
        return self.u.transpose(1, 2).flatten(2)

    @cached_property
    def _tall_v(self) -> Tensor:
        """[V₁ V₂ …]ᵀ: (n, r·b2', a2')"""
        return self.v.mT.flatten(1, 2)

    def take(self, layers: Tensor) -> Rearranged:
        return Rearranged(self.u[layers], self.v[layers], tuple(m if m is None else m[layers] for m in self.modes))

    def to(self, dtype: torch.dtype) -> Rearranged:
        """Convert the dtype; the result cannot be lifted back to original coordinates."""
        return Rearranged(self.u.to(dtype), self.v.to(dtype))

    def matmul(self, x: Tensor) -> Tensor:
        """Return R x for k vectors per layer: x (n, k, b1'·b2') -> (n, k, a1'·a2')."""
        n, k, _ = x.shape
        rank, (a1, a2), (b1, b2) = self.u.shape[1], self.rows, self.columns
        x = x.reshape(n, k, b1, b2)
        if b1 * a2 * (b2 + a1) <= a1 * b2 * (b1 + a2):  # V first, then U
            y = x.reshape(n, k * b1, b2) @ self.v.reshape(n, rank * a2, b2).mT
            y = y.reshape(n, k, b1, rank, a2).permute(0, 3, 2, 1, 4).reshape(n, rank * b1, k * a2)
            y = self._wide_u @ y
            return y.reshape(n, a1, k, a2).transpose(1, 2).reshape(n, k, a1 * a2)
        y = self.u.reshape(n, rank * a1, b1) @ x.transpose(1, 2).reshape(n, b1, k * b2)
        y = y.reshape(n, rank, a1, k, b2).permute(0, 3, 2, 1, 4).reshape(n, k * a1, rank * b2)
        return (y @ self._tall_v).reshape(n, k, a1 * a2)

    def gram(self) -> Tensor:
        """Return R Rᵀ = Σᵢⱼ (Uᵢ Uⱼᵀ) ⊗ (Vᵢ Vⱼᵀ): (n, a1'·a2', a1'·a2')."""
        (a1, a2), n = self.rows, len(self.u)
        uu = _products(self.u).permute(0, 2, 4, 1, 3).reshape(n, a1 * a1, -1)
        vv = _products(self.v).permute(0, 1, 3, 2, 4).reshape(n, -1, a2 * a2)
        return (uu @ vv).reshape(n, a1, a1, a2, a2).transpose(2, 3).reshape(n, a1 * a2, a1 * a2)

    def dense(self) -> Tensor:
        """Return R itself, (n, a1'·a2', b1'·b2'); only for small sizes."""
        return torch.cat(list(self._blocks()), dim=1)

    def residual(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ‖R − leftᵀ·right‖ per layer, by blocks: left (n, k, a1'·a2'), right (n, k, b1'·b2') -> (n,).

        Exact up to float64 rounding of ‖R‖, whereas ‖R‖² − Σσ² would lose half of the digits.
        """
        total, row = torch.zeros(len(left), dtype=left.dtype, device=left.device), 0
        for block in self._blocks():
            part = left[:, :, row : row + block.shape[1]].mT @ right
            total += (block - part).square().sum((1, 2))
            row += block.shape[1]
        return total.sqrt()

    def lift(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Convert vectors in reduced coordinates to matrices (n, k, a1, a2) and (n, k, b1, b2)."""
        a1, a2, b1, b2 = self.modes
        return (
            _expand(left.reshape(*left.shape[:2], *self.rows), a1, a2),
            _expand(right.reshape(*right.shape[:2], *self.columns), b1, b2),
        )

    def _blocks(self) -> Iterator[Tensor]:
        """Yield R from top to bottom, in blocks of rows of U."""
        (a1, a2), (b1, b2), n = self.rows, self.columns, len(self.u)
        step = max(1, BLOCK // (n * a2 * b1 * b2))
        for start in range(0, a1, step):
            u = self.u[:, :, start : start + step]
            block = u.permute(0, 2, 3, 1).flatten(1, 2) @ self.v.flatten(2)  # (n, step·b1, a2·b2)
            yield block.reshape(n, -1, b1, a2, b2).transpose(2, 3).reshape(n, -1, b1 * b2)


def _reduce_mode(stack: Tensor) -> tuple[Tensor, Tensor | None]:
    """Reduce matrices (n, r, p, q) with p > r·q to coordinates (n, r, r·q, q) in a basis (n, p, r·q)."""
    n, rank, p, q = stack.shape
    if p <= rank * q:
        return stack, None
    basis, coordinates = torch.linalg.qr(stack.transpose(1, 2).reshape(n, p, rank * q))
    return coordinates.reshape(n, rank * q, rank, q).transpose(1, 2), basis


def _expand(stack: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Convert matrices (n, k, p', q') back to original coordinates, (n, k, p, q)."""
    if rows is not None:
        stack = rows[:, None] @ stack
    return stack if columns is None else stack @ columns[:, None].mT


def _products(stack: Tensor) -> Tensor:
    """Return Mᵢ Mⱼᵀ for every pair: (n, r, p, q) -> (n, r, p, r, p), indexed i, row, j, column."""
    n, rank, p, q = stack.shape
    flat = stack.reshape(n, rank * p, q)
    return (flat @ flat.mT).reshape(n, rank, p, rank, p)
