"""The two normal forms of a layer's delta in files: one product up·down, or one Kronecker term.

Conversions are exact: a sum takes the form of the target only if no value changes beyond rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.formats.forms.delta_form import LayerFactorization, SumFactorization
from krona_hub.kron.hadamard import Hadamard, as_low_rank, expanded, is_hadamard
from krona_hub.kron.terms import (
    Factor,
    KronTerms,
    LowRank,
    as_lora,
    dense_factor,
    factor_tensors,
    map_factor,
    rank_bound,
    stored_rank,
    wide,
)
from krona_hub.kron.to_lora import nearest_lora

PROPORTIONAL = 1e-7  # relative tolerance within which two factors count as multiples of each other


class Lora(NamedTuple):
    """A delta as one product of two matrices, with the scale folded in."""

    up: Tensor  # (out, r)
    down: Tensor  # (r, in·k…)


def form_of(delta: LayerDelta, layer: str = "") -> LayerFactorization:
    """The factorization of a delta, for the rules of `krona_hub.formats.compatibility`."""
    axis = None if delta.magnitude is None else delta.magnitude_axis
    return LayerFactorization(tuple(delta.weight_shape), tuple(_sum_form(s) for s in delta.sums), axis, layer)


def _sum_form(s: KronTerms) -> SumFactorization:
    return SumFactorization(s.shape, s.terms, _rank_as_product(s.left), _rank_as_product(s.right), s.rows)


def _rank_as_product(factor: Factor) -> int | None:
    """The rank of a factor as `lora_of` returns it; None for a dense factor."""
    return rank_bound(factor) if isinstance(factor, Hadamard) else stored_rank(factor)


def lora_of(delta: LayerDelta) -> Lora | None:
    """The delta as up·down of its concatenated sums; None if a sum is not a LoRA as stored.

    A scalar factor other than 1 is folded into up, in float32 at least; otherwise up and down keep their dtypes.
    """
    pairs = [_lora_of_sum(s) for s in delta.sums if s.rows == "kron" or 1 in (s.shape.a1, s.shape.b1)]
    known = [p for p in pairs if p is not None]
    if len(known) < len(delta.sums):
        return None
    if not known:  # a DoRA with unchanged directions, or an empty delta
        out, in_ = delta.matrix_shape
        return Lora(torch.zeros(out, 1), torch.zeros(1, in_))
    return known[0] if len(known) == 1 else Lora(_cat([p.up for p in known], 1), _cat([p.down for p in known], 0))


def _lora_of_sum(s: KronTerms) -> Lora | None:
    """The sum as a LoRA if it is [[c]] ⊗ up·down, up·down ⊗ [[c]], column ⊗ row or row ⊗ column; else None."""
    (a1, a2, b1, b2), left, right = s.shape, s.left, s.right
    if (a1, a2) == (1, 1) and isinstance(right, LowRank):
        return _scaled_pairs(right, dense_factor(left).flatten())
    if (b1, b2) == (1, 1) and isinstance(left, LowRank):
        return _scaled_pairs(left, dense_factor(right).flatten())
    if isinstance(left, LowRank) or isinstance(right, LowRank):
        return None
    if (a2, b1) == (1, 1):
        return Lora(left[:, :, 0].mT, right[:, 0, :])
    if (a1, b2) == (1, 1):
        return Lora(right[:, :, 0].mT, left[:, 0, :])
    return None


def _scaled_pairs(pairs: LowRank, scales: Tensor) -> Lora:
    """Σₖ scale[k]·up[k]·down[k] as one pair."""
    pairs = as_low_rank(pairs)
    up = pairs.up
    if bool((scales != 1).any()):
        up = wide(up) * wide(scales)[:, None, None]
    return Lora(up.transpose(0, 1).flatten(1), pairs.down.flatten(0, 1))


def term_of(delta: LayerDelta) -> KronTerms | None:
    """The delta as one term A ⊗ B in plain row order; None if it needs several terms.

    A LoRA becomes [[1]] ⊗ up·down; terms whose A's (or B's) are multiples of one another are combined.
    """
    lora = lora_of(delta)
    if lora is not None:
        return as_lora(*lora)
    if not all(s.rows == "kron" or 1 in (s.shape.a1, s.shape.b1) for s in delta.sums):
        return None
    terms = [KronTerms(_nth(s.left, k), _nth(s.right, k)) for s in delta.sums for k in range(s.terms)]
    return terms[0] if len(terms) == 1 else _collected(terms)


def _collected(terms: Sequence[KronTerms]) -> KronTerms | None:
    """Σ Aₖ ⊗ Bₖ as A ⊗ Σ cₖBₖ if Aₖ = cₖA, or the same with A and B exchanged; None if neither holds."""
    if len({t.shape for t in terms}) > 1:
        return None
    scales = multiples([t.left for t in terms])
    if scales is not None:
        return KronTerms(terms[0].left, _combined([t.right for t in terms], scales))
    scales = multiples([t.right for t in terms])
    if scales is not None:
        return KronTerms(_combined([t.left for t in terms], scales), terms[0].right)
    return None


def multiples(factors: Sequence[Factor]) -> list[float] | None:
    """The coefficients cₖ with factor k = cₖ · factor 0; None if the factors are not proportional."""
    first, *rest = (dense_factor(f)[0].double() for f in factors)
    norm = torch.linalg.vector_norm(first)
    if norm == 0:
        return None
    scales = [1.0]
    for other in rest:
        scale = float((other * first).sum() / norm**2)
        if torch.linalg.vector_norm(other - scale * first) > PROPORTIONAL * torch.linalg.vector_norm(other):
            return None
        scales.append(scale)
    return scales


def _combined(factors: Sequence[Factor], scales: Sequence[float]) -> Factor:
    """Σ scale·factor: a product of the concatenated halves if all factors are products, else dense."""
    products = [f for f in factors if isinstance(f, LowRank)]
    if len(products) == len(factors):
        products = [as_low_rank(p) for p in products]
        ups = [p.up if c == 1 else wide(p.up) * c for p, c in zip(products, scales, strict=True)]
        return LowRank(_cat(ups, 2), _cat([p.down for p in products], 1))
    total = sum(dense_factor(f).double() * c for f, c in zip(factors, scales, strict=True))
    return torch.as_tensor(total).float()


def _nth(factor: Factor, k: int) -> Factor:
    """Factor k of a stack, as a stack of one."""
    return map_factor(lambda t: t[k : k + 1], factor)


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate along `dim`, in the widest dtype of all tensors."""
    wide = tensors[0].dtype
    for t in tensors:
        wide = torch.promote_types(wide, t.dtype)
    return torch.cat([t.to(wide) for t in tensors], dim)


def lora_rank(delta: LayerDelta) -> int | None:
    """The rank of a delta stored as LoRA; None for any other Kronecker sum."""
    return form_of(delta).lora_rank


def is_lora(delta: LayerDelta) -> bool:
    """Whether a delta is stored as LoRA; a LoHa is not, although it equals one of higher rank."""
    return lora_rank(delta) is not None and not has_hadamard(delta)


def has_hadamard(delta: LayerDelta) -> bool:
    """Whether a delta contains an elementwise product, which krona reads but no format of it stores."""
    return any(map(is_hadamard, delta.sums))


def without_hadamard(delta: LayerDelta, *, to_lora: bool = False) -> LayerDelta:
    """An equal delta without elementwise products: each as up·down, or dense if that is smaller and not `to_lora`."""
    if not has_hadamard(delta):
        return delta
    return replace(delta, sums=tuple(expanded(s, always_low_rank=to_lora) for s in delta.sums))


def exact_lora_of(delta: LayerDelta) -> Lora:
    """A LoRA equal to Σ A ⊗ B: the stored one if there is one, else by SVD of the factors at the lowest exact rank."""
    own = lora_of(delta)
    if own is not None:
        return own
    fit = nearest_lora(delta.sums, max_error=0.0)
    return Lora(fit.up, fit.down)


def with_lora(delta: LayerDelta, lora: Lora) -> LayerDelta:
    return replace(delta, sums=(as_lora(*lora),))


def padded(lora: Lora, rank: int) -> Lora:
    """The same product with a higher rank, by columns and rows of zeros.

    >>> padded(Lora(torch.ones(2, 1), torch.ones(1, 3)), 2).down
    tensor([[1., 1., 1.],
            [0., 0., 0.]])
    """
    more = rank - len(lora.down)
    pad = torch.nn.functional.pad
    return lora if more <= 0 else Lora(pad(lora.up, (0, more)), pad(lora.down, (0, 0, 0, more)))


def words_of(delta: LayerDelta) -> str:
    """The factorization in words.

    >>> import torch
    >>> words_of(LayerDelta((as_lora(torch.ones(4, 2), torch.ones(2, 6)),), (4, 6)))
    'LoRA r2'
    """
    rank = lora_rank(delta)
    stored_as_lora = rank is not None and not has_hadamard(delta)
    words = f"LoRA r{rank}" if stored_as_lora else " + ".join(_sum_words(s) for s in delta.sums)
    return (words if delta.sums else "zero") + (", DoRA" if delta.magnitude is not None else "")


def _sum_words(terms: KronTerms) -> str:
    if terms.shape[:2] == (1, 1) and terms.terms == 1 and isinstance(terms.right, Hadamard):
        return f"LoHa r{terms.right.first.rank}"
    if terms.shape[:2] == (1, 1) and terms.terms == 1 and isinstance(terms.right, LowRank):
        return f"LoRA r{terms.right.rank}"
    whole = terms.shape[:2] == (1, 1) and not isinstance(terms.right, LowRank)
    words = "dense" if whole else str(terms.shape)
    for name, factor in (("A", terms.left), ("B", terms.right)):
        words += f", {name} r{factor.rank}" if isinstance(factor, LowRank) else ""
    if terms.rows == "shuffled":
        words += ", shuffled rows"
    return f"{terms.terms} × {words}" if terms.terms > 1 else words


def size_of(delta: LayerDelta) -> tuple[int, int]:
    """Number of stored parameters and bytes of a delta, without the constant A = [[1]] of a LoRA."""
    tensors = [t for s in delta.sums for t in _counted(s)]
    tensors += [] if delta.magnitude is None else [delta.magnitude]
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


def _counted(terms: KronTerms) -> tuple[Tensor, ...]:
    constant = terms.shape[:2] == (1, 1) and isinstance(terms.right, LowRank)
    return factor_tensors(terms.right) if constant else terms.tensors
