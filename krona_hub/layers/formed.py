"""(W + ΔW) x of a small linear layer: here the weight is formed, for a moment.

The chain of `contraction` makes fewer multiply-adds at any size, but more and smaller products. Where a whole weight is
a few hundred kilobytes, their overhead costs more than they save. Derivatives are those of the dense weight, folded
into the factors by the rearrangement of Van Loan & Pitsianis (1993): R(A ⊗ B) = vec(A) vec(B)ᵀ. Only x and the factors
are kept for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from krona_hub.kron.shapes import KronShape
from krona_hub.kron.terms import Rows
from krona_hub.layers.factors import KronSum

SMALL = 2**17  # numbers of a weight: about where both cost the same on a CPU (benchmarks/bench_formed.py)
Sizes = tuple[int, int, int, int]
# The axes (a1, a2, b1, b2) of R(ΔW) in the order that they have in ΔW, whose rows are "shuffled" in DiffuseKronA
AXES: Mapping[Rows, Sizes] = {"kron": (0, 2, 1, 3), "shuffled": (2, 0, 1, 3)}


class Stored(NamedTuple):
    """What a Kronecker sum is beside its tensors."""

    names: tuple[str, ...]  # of the factors, in the order of their tensors
    shape: KronShape
    rows: Rows
    scale: float
    trained: bool

    @property
    def rearranged(self) -> Sizes:
        """Of R(ΔW) as (a1, a2, b1, b2)."""
        return self.shape.a1, self.shape.a2, self.shape.b1, self.shape.b2


def with_formed_weight(x: Tensor, weight: Tensor, bias: Tensor | None, sums: Sequence[tuple[KronSum, float]]) -> Tensor:
    """(W + Σ scale · ΔW) x + bias, differentiable by x and by the factors: (…, in) → (…, out).

    `sums` have their scales beside them. W (out, in) and bias are frozen; everything is of one floating type.
    """
    stored = tuple(Stored(kron.names, kron.shape, kron.rows, scale, kron.is_trained) for kron, scale in sums)
    factors = [factor for kron, _ in sums for factor in kron.factors]
    made: Tensor = _FormedLinear.apply(x, weight, bias, stored, *factors)  # type: ignore[no-untyped-call]
    return made


class _FormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stored: tuple[Stored, ...], *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *factors)
        ctx.stored = stored
        return functional.linear(x, _formed(weight, stored, factors), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *factors = ctx.saved_tensors
        dx = g @ _formed(weight, ctx.stored, factors) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = [None] * len(factors)
        if any(each.trained for each in ctx.stored):
            grads = _gradients(g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, x.shape[-1]), ctx.stored, factors)
        return dx, None, None, None, *grads


def _formed(weight: Tensor, stored: Sequence[Stored], factors: Sequence[Tensor]) -> Tensor:
    """W + Σ scale · ΔW."""
    total = weight
    for each, named in _by_sum(stored, factors):
        product = _numbers("left", named).mT @ _numbers("right", named)
        blocks = product.view(each.rearranged).permute(AXES[each.rows])
        total = torch.add(total.view(blocks.shape), blocks, alpha=each.scale)
    return total.view(weight.shape)


def _gradients(dw: Tensor, stored: Sequence[Stored], factors: Sequence[Tensor]) -> list[Tensor | None]:
    """The derivatives of all factors, from that of the weight."""
    found: list[Tensor | None] = []
    for each, named in _by_sum(stored, factors):
        own = _of_sum(dw, each, named) if each.trained else {}
        found += [own.get(name) for name in each.names]
    return found


Named = Mapping[str, Tensor]  # the factors of a sum, as `KronSum` names them


def _by_sum(stored: Sequence[Stored], factors: Sequence[Tensor]) -> Iterator[tuple[Stored, Named]]:
    rest = iter(factors)
    for each in stored:
        yield each, {name: next(rest) for name in each.names}


def _numbers(side: str, named: Named) -> Tensor:
    """A or B of every term, (terms, p·q); ones for a side that is not stored, as it is one number."""
    if side in named:
        return named[side].flatten(1)
    if f"{side}_up" in named:
        return (named[f"{side}_up"] @ named[f"{side}_down"]).flatten(1)
    some = next(iter(named.values()))
    return some.new_ones(len(some), 1)


def _of_sum(dw: Tensor, each: Stored, named: Named) -> Named:
    """The derivatives of the factors of one sum, by their names."""
    axes, sizes = AXES[each.rows], each.rearranged
    blocks = dw.view([sizes[axis] for axis in axes]).permute([axes.index(axis) for axis in range(4)])
    r = blocks.reshape(sizes[0] * sizes[1], -1)
    a, b = _numbers("left", named), _numbers("right", named)
    of_a, of_b = (each.scale * b) @ r.mT, (each.scale * a) @ r
    return _of_factor("left", of_a, named) | _of_factor("right", of_b, named)


def _of_factor(side: str, d: Tensor, named: Named) -> dict[str, Tensor]:
    """Of what a side is stored as, from that of its numbers (terms, p·q)."""
    if side in named:
        return {side: d.view(named[side].shape)}
    up, down = named.get(f"{side}_up"), named.get(f"{side}_down")
    if up is None or down is None:
        return {}
    d = d.view(len(up), up.shape[1], down.shape[2])
    return {f"{side}_up": d @ down.mT, f"{side}_down": up.mT @ d}
