"""ΔW x without ΔW: a chain of small products, added to the output of the base layer.

If gradients are needed, one `torch.autograd.Function` saves only x and the factors: x, which the q, k and v of an
attention share, is never cast or copied. Intermediate states are recomputed in backward, at a few percent of the cost
of the base layer. `torch.compile` sees plain products instead, which it fuses by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from krona_hub.kron.terms import Rows
from krona_hub.layers.chain import Chain, ChainStep
from krona_hub.layers.chain_step import Window, arrange, forward, gather, to_factor, to_input


@dataclass(frozen=True)
class Contraction:
    """How to apply one Kronecker sum to rows (N, in), or to images (N, in, …) with a window."""

    chain: Chain
    left_rows: int  # a1
    rows: Rows = "kron"
    window: Window | None = None
    beside: Chain | None = None  # the other order, if backward is cheaper with both

    def delta(self, x: Tensor, factors: Sequence[Tensor], scale: Tensor | float = 1.0) -> Tensor:
        """Return scale · ΔW x as plain products: (N, in, …) → (N, out, …). For torch.compile and DoRA."""
        z, last = self.state_of(x), self.chain.steps[-1]
        for step in self.chain.steps:
            w = arrange(factors[step.factor], step)
            z = forward(z, _like(w * scale if step is last else w, x), step, self.window)
        return self.to_row_order(z)

    def state_of(self, x: Tensor) -> Tensor:
        """Reshape the input to (N, in) or (N, in, …)."""
        return x.reshape(-1, x.shape[-1]) if self.window is None else x

    def to_row_order(self, y: Tensor) -> Tensor:
        """Put the rows of A ⊗ B in the order of the layer: interleaved if they are `shuffled`."""
        if self.rows == "kron":
            return y
        return y.reshape(len(y), self.left_rows, -1, *y.shape[2:]).transpose(1, 2).reshape(y.shape)

    def from_row_order(self, g: Tensor) -> Tensor:
        """The inverse of `to_row_order`."""
        if self.rows == "kron":
            return g
        return g.reshape(len(g), -1, self.left_rows, *g.shape[2:]).transpose(1, 2).reshape(g.shape)


def add_delta(
    out: Tensor, x: Tensor, plan: Contraction, factors: Sequence[Tensor], scale: float, in_place: bool
) -> Tensor:
    """Return out + scale · ΔW x, written into `out` if the caller owns it.

    `out` is (N, out), or (N, out, …) for a convolution; `x` has the same rows, (…, in) with any leading axes.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out, x, *factors)):
        result: Tensor = _AddDelta.apply(out, x, plan, scale, in_place, *factors)  # type: ignore[no-untyped-call]
        return result
    return _add(out if in_place else out.clone(), x, plan, factors, scale)


def _add(out: Tensor, x: Tensor, plan: Contraction, factors: Sequence[Tensor], scale: float) -> Tensor:
    with _without_autocast(x):
        *steps, last = plan.chain.steps
        z = plan.state_of(x)
        for step in steps:
            z = forward(z, _matrix(factors, step, x.dtype, x.device), step, plan.window)
        dtype = out.dtype if steps else x.dtype  # x itself is never cast
        w = _matrix(factors, last, dtype, x.device, scale)
        _add_last(out, z.to(dtype), w, last, plan)
    return out


def _add_last(out: Tensor, z: Tensor, w: Tensor, step: ChainStep, plan: Contraction) -> None:
    """Add the last product to `out`, within the product itself if the layout allows it."""
    n = len(z)
    direct = plan.rows == "kron" and out.dtype == z.dtype and out.is_contiguous()
    if direct and step.side == "left" and step.q * prod(z.shape[2:]) > 1:
        out.view(n, len(w), -1).baddbmm_(w.expand(n, *w.shape), z.reshape(n, w.shape[1], -1))
    elif direct and plan.window is None:
        out.view(-1, len(w)).addmm_(z.reshape(-1, w.shape[1]), w.mT)
    else:
        out.add_(plan.to_row_order(forward(z, w, step, plan.window)))


class _AddDelta(torch.autograd.Function):
    """out + scale · ΔW x; backward recomputes the intermediate states."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, plan: Contraction, scale: float, in_place: bool, *factors: Tensor
    ) -> Tensor:
        trained = any(f.requires_grad for f in factors)
        ctx.save_for_backward(x if trained else None, *factors)
        ctx.plan, ctx.scale, ctx.like = plan, scale, (x.shape, x.dtype, x.device)
        if in_place:
            ctx.mark_dirty(out)
        return _add(out if in_place else out.clone(), x, plan, factors, scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        derivatives = _through_both if ctx.plan.beside and x is not None else _through_one
        with _without_autocast(g):
            dx, grads = derivatives(ctx, g, x, factors)
        return g, dx, None, None, None, *grads


Derivatives = tuple[Tensor | None, list[Tensor | None]]  # of x, of the factors


def _through_one(ctx: Any, g: Tensor, x: Tensor | None, factors: Sequence[Tensor]) -> Derivatives:
    """Differentiate through the chain, recomputing its states."""
    plan: Contraction = ctx.plan
    shape, dtype, device = ctx.like
    steps = plan.chain.steps
    types = [dtype] * (len(steps) - 1) + [g.dtype if len(steps) > 1 else dtype]
    scales = [1.0] * (len(steps) - 1) + [ctx.scale]
    matrices = [_matrix(factors, s, t, device, c) for s, t, c in zip(steps, types, scales, strict=True)]
    states = [] if x is None else _states(x, matrices, types, plan)
    grads: list[Tensor | None] = [None] * len(factors)
    back = plan.from_row_order(g)
    for i in reversed(range(len(steps))):
        step, back = steps[i], back.to(types[i])
        if states and ctx.needs_input_grad[5 + step.factor]:
            found = to_factor(back, states[i], matrices[i], step, plan.window)
            grads[step.factor] = _as_factor(found * scales[i], step, factors)
        if i == 0 and not ctx.needs_input_grad[1]:
            return None, grads
        back = to_input(back, _shape_before(plan, steps[: i + 1], shape, g.shape), matrices[i], step, plan.window)
    return back.reshape(shape), grads


def _through_both(ctx: Any, g: Tensor, x: Tensor, factors: Sequence[Tensor]) -> Derivatives:
    """Differentiate through the last step of both orders, each to its first factor, without recomputing states."""
    plan: Contraction = ctx.plan
    shape, dtype, device = ctx.like
    grads: list[Tensor | None] = [None] * len(factors)
    dx, back, first = None, plan.from_row_order(g), plan.state_of(x)
    ends = [chain.steps for chain in (plan.chain, plan.beside) if chain]
    cheapest = min((opened for opened, _ in ends), key=lambda step: step.cost)
    for opened, closing in ends:
        before = _shape_before(plan, (opened, closing), shape, g.shape)
        w = _matrix(factors, closing, g.dtype, device, ctx.scale)
        state = to_input(back, before, w, closing, plan.window).to(dtype)
        w = _matrix(factors, opened, dtype, device)
        if ctx.needs_input_grad[5 + opened.factor]:
            found = to_factor(state, first, w, opened, plan.window)
            grads[opened.factor] = _as_factor(found, opened, factors)
        if ctx.needs_input_grad[1] and opened is cheapest:
            dx = to_input(state, first.shape, w, opened, plan.window).reshape(shape)
    return dx, grads


def _as_factor(found: Tensor, step: ChainStep, factors: Sequence[Tensor]) -> Tensor:
    """Convert the derivative of W to that of the factor."""
    factor = factors[step.factor]
    return gather(found, step, factor.shape).to(factor)


def _states(x: Tensor, matrices: Sequence[Tensor], types: Sequence[torch.dtype], plan: Contraction) -> list[Tensor]:
    """Compute the state before each step."""
    states = [plan.state_of(x)]
    for step, w in zip(plan.chain.steps[:-1], matrices, strict=False):
        states.append(forward(states[-1], w, step, plan.window))
    states[-1] = states[-1].to(types[-1])
    return states


def _shape_before(plan: Contraction, steps: Sequence[ChainStep], x: torch.Size, out: torch.Size) -> torch.Size:
    """The shape of the state before the last of `steps`: images have the size of x until the kernel is applied."""
    applied = plan.window is None or any(earlier.kernel for earlier in steps[:-1])
    return torch.Size((out[0], steps[-1].p * steps[-1].k * steps[-1].q, *(out if applied else x)[2:]))


def _matrix(
    factors: Sequence[Tensor], step: ChainStep, dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> Tensor:
    """Return W of a step in its compute type; the scale is multiplied in before rounding."""
    w = arrange(factors[step.factor], step)
    return (w * scale if scale != 1.0 else w).to(device=device, dtype=dtype)


def _like(w: Tensor, x: Tensor) -> Tensor:
    return w.to(device=x.device, dtype=x.dtype)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast, which would cast x for every layer that shares it."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
