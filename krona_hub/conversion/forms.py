"""What form a delta has: is it a LoRA, how is it called, which LoRA equals it."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.adapter import LayerDelta
from krona_hub.kron.lowrank import nearest_lora
from krona_hub.kron.terms import KronTerms, LowRank, as_lora, dense_factor, factor_tensors


class Lora(NamedTuple):
    up: Tensor  # (out, r)
    down: Tensor  # (r, in)


def is_lora_sum(terms: KronTerms) -> bool:
    """[[c]] ⊗ (up·down): a LoRA, whatever the number in A."""
    return terms.shape[:2] == (1, 1) and isinstance(terms.right, LowRank) and terms.rows == "kron"


def is_lora(delta: LayerDelta) -> bool:
    return all(is_lora_sum(s) for s in delta.sums)


def own_lora(delta: LayerDelta) -> Lora:
    """The LoRA that a LoRA-shaped delta is, its terms and sums side by side; exact, nothing recomputed."""
    pairs = [_term_lora(s, k) for s in delta.sums for k in range(s.terms)]
    dtype = torch.promote_types(pairs[0][0].dtype, torch.float32)
    ups, downs = zip(*((up.to(dtype), down.to(dtype)) for up, down in pairs), strict=True)
    return Lora(torch.cat(ups, dim=1), torch.cat(downs, dim=0))


def _term_lora(terms: KronTerms, k: int) -> Lora:
    scalar, right = dense_factor(terms.left)[k, 0, 0], terms.right
    if not isinstance(right, LowRank):
        raise TypeError("only a LoRA-shaped sum has a LoRA of its own")
    return Lora(right.up[k] * scalar, right.down[k])


def exact_lora_of(delta: LayerDelta) -> Lora:
    """A LoRA equal to Σ A ⊗ B: its own where it has one, else by SVD of the factors, at the least rank."""
    if is_lora(delta):
        return own_lora(delta)
    fit = nearest_lora(delta.sums, max_error=0.0)
    return Lora(fit.up, fit.down)


def with_lora(delta: LayerDelta, lora: Lora) -> LayerDelta:
    return replace(delta, sums=(as_lora(*lora),))


def form_of(delta: LayerDelta) -> str:
    """The form in words.

    >>> form_of(LayerDelta((as_lora(torch.ones(4, 2), torch.ones(2, 6)),), (4, 6)))
    'LoRA r2'
    """
    if not delta.sums:
        return "zero"
    if is_lora(delta):
        words = f"LoRA r{sum(s.terms * s.right.rank for s in delta.sums if isinstance(s.right, LowRank))}"
    else:
        words = " + ".join(_sum_form(s) for s in delta.sums)
    return words if delta.magnitude is None else f"{words}, DoRA"


def _sum_form(terms: KronTerms) -> str:
    shape = terms.shape
    words = "dense" if shape[:2] == (1, 1) and not isinstance(terms.right, LowRank) else str(shape)
    if isinstance(terms.left, LowRank):
        words += f", A r{terms.left.rank}"
    if isinstance(terms.right, LowRank):
        words += f", B r{terms.right.rank}"
    if terms.rows == "shuffled":
        words += ", shuffled rows"
    return f"{terms.terms} × {words}" if terms.terms > 1 else words


def size_of(delta: LayerDelta) -> tuple[int, int]:
    """Parameters and bytes that the delta is stored in; the constant A = [[1]] of a LoRA is not counted."""
    tensors = [t for s in delta.sums for t in _counted(s)]
    tensors += [] if delta.magnitude is None else [delta.magnitude]
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


def _counted(terms: KronTerms) -> tuple[Tensor, ...]:
    return factor_tensors(terms.right) if is_lora_sum(terms) else terms.tensors


def cast(delta: LayerDelta, dtype: torch.dtype) -> LayerDelta:
    """The same delta with every stored tensor rounded once to `dtype`."""

    def factor(value: Tensor | LowRank) -> Tensor | LowRank:
        return LowRank(value.up.to(dtype), value.down.to(dtype)) if isinstance(value, LowRank) else value.to(dtype)

    sums = tuple(replace(s, left=factor(s.left), right=factor(s.right)) for s in delta.sums)
    magnitude = None if delta.magnitude is None else delta.magnitude.to(dtype)
    return replace(delta, sums=sums, magnitude=magnitude)
