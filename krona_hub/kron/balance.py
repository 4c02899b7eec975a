"""Powers of two moved between the tensors of a product, so that a cast to a narrow range loses no values.

float16 holds few digits below 6e-5 and none above 65504. A term A ⊗ B, and A or B as up·down, does not change when one
tensor is multiplied by 2ⁿ and another one by 2⁻ⁿ; if the largest numbers of all tensors are similar, most fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from krona_hub.kron.terms import Factor, KronTerms, LowRank, factor_tensors, wide

FARTHEST = 100  # exponent: one multiplication in float32 holds no larger powers of two


def loses_values(terms: KronTerms, small: KronTerms) -> bool:
    """Return whether `small`, a cast of `terms`, differs by more than its rounding: numbers left its range.

    >>> x = KronTerms(torch.ones(1, 2, 2), torch.full((1, 3, 2), 1e-6))
    >>> loses_values(x, x.to(torch.half)), loses_values(x, x.to(torch.bfloat16))
    (True, False)
    """
    pairs = zip((terms.left, terms.right), (small.left, small.right), strict=True)
    return any(_loses(t, c, dims) for pair in pairs for t, c, dims in _compared(*pair))


def _compared(factor: Factor, small: Factor) -> Iterator[tuple[Tensor, Tensor, tuple[int, ...]]]:
    """Yield every tensor, its cast, and the dimensions within which its numbers share a power of two."""
    if isinstance(factor, LowRank) and isinstance(small, LowRank):
        yield factor.up, small.up, (1,)
        yield factor.down, small.down, (2,)
    elif isinstance(factor, Tensor) and isinstance(small, Tensor):
        yield factor, small, (1, 2)


def _loses(tensor: Tensor, small: Tensor, dims: tuple[int, ...]) -> bool:
    """Compare the error with the unit roundoff, which bounds that of every number within the range."""
    if not bool(torch.isfinite(small).all()):
        return True
    target = torch.finfo(small.dtype)
    if torch.finfo(tensor.dtype).tiny >= target.tiny:  # nothing is too small: bfloat16 has the exponents of float32
        return False
    exact = wide(tensor)
    error = (small.to(exact.dtype) - exact).abs().sum(dims)  # squares would underflow
    return bool((error > target.eps / 2 * exact.abs().sum(dims)).any())


def balanced(terms: KronTerms) -> KronTerms:
    """Return the same sum with tensors of similar largest numbers, at least float32; only exponents change.

    >>> one = KronTerms(torch.full((1, 2, 2), 1024.0), torch.full((1, 3, 2), 2.0**-20))
    >>> even = balanced(one)
    >>> float(even.left.max()), float(even.right.max()), torch.equal(even.dense(), one.dense())
    (0.03125, 0.03125, True)
    """
    if not all(t.numel() for t in terms.tensors):
        return terms
    left, right = _balanced_product(terms.left), _balanced_product(terms.right)
    if _is_one(left):  # the constant A of a LoRA, which most formats do not store
        return replace(terms, right=right)
    sizes = _exponents(left), _exponents(right)
    known = torch.isfinite(sizes[0] + sizes[1])
    count = len(factor_tensors(left)), len(factor_tensors(right))
    surplus = (sizes[0] / count[0] - sizes[1] / count[1]) / (1 / count[0] + 1 / count[1])
    shift = torch.where(known, surplus, 0.0).round().clamp(-FARTHEST, FARTHEST)
    return replace(terms, left=_shifted(left, -shift), right=_shifted(right, shift))


def _is_one(factor: Factor) -> bool:
    return isinstance(factor, Tensor) and factor.shape[1:] == (1, 1) and bool((factor == 1).all())


def _exponents(factor: Factor) -> Tensor:
    """Return log₂ of the largest number of each matrix of the stack, added up over up and down: (terms,)."""
    return torch.stack([t.abs().amax((1, 2)).double().log2() for t in factor_tensors(factor)]).sum(0)


def _balanced_product(factor: Factor) -> Factor:
    """Balance column k of up with row k of down, for each k."""
    if not isinstance(factor, LowRank):
        return wide(factor)
    up, down = wide(factor.up), wide(factor.down)
    excess = (up.abs().amax(1).double().log2() - down.abs().amax(2).double().log2()) / 2  # (terms, r)
    shift = torch.where(torch.isfinite(excess), excess, 0.0).round().clamp(-FARTHEST, FARTHEST)
    return LowRank(up * _power(-shift, up)[:, None, :], down * _power(shift, down)[:, :, None])


def _shifted(factor: Factor, shift: Tensor) -> Factor:
    """Multiply matrix k of the stack by 2^shift[k], in halves if it is a product."""
    if not isinstance(factor, LowRank):
        return factor * _power(shift, factor)[:, None, None]
    half = (shift / 2).floor()
    up, down = _power(half, factor.up), _power(shift - half, factor.down)
    return LowRank(factor.up * up[:, None, None], factor.down * down[:, None, None])


def _power(exponent: Tensor, like: Tensor) -> Tensor:
    return torch.exp2(exponent).to(like.dtype)  # exact: float64 powers of two within FARTHEST fit float32
