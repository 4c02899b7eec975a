"""What form a delta has: is it a LoRA, how is it called, how large is it, which LoRA equals it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.formats.forms.normal_forms import Lora, form_of, lora_of
from krona_hub.kron.terms import KronTerms, LowRank, as_lora, factor_tensors
from krona_hub.kron.to_lora import nearest_lora


def lora_rank(delta: LayerDelta) -> int | None:
    """The rank of the LoRA that a delta is as it stands; None for a Kronecker adapter."""
    return form_of(delta).lora_rank


def is_lora(delta: LayerDelta) -> bool:
    return lora_rank(delta) is not None


def exact_lora_of(delta: LayerDelta) -> Lora:
    """A LoRA equal to Σ A ⊗ B: its own where it is one, else by SVD of the factors, at the least rank."""
    own = lora_of(delta)
    if own is not None:
        return own
    fit = nearest_lora(delta.sums, max_error=0.0)
    return Lora(fit.up, fit.down)


def with_lora(delta: LayerDelta, lora: Lora) -> LayerDelta:
    return replace(delta, sums=(as_lora(*lora),))


def words_of(delta: LayerDelta) -> str:
    """The form in words.

    >>> import torch
    >>> words_of(LayerDelta((as_lora(torch.ones(4, 2), torch.ones(2, 6)),), (4, 6)))
    'LoRA r2'
    """
    rank = lora_rank(delta)
    words = " + ".join(_sum_words(s) for s in delta.sums) if rank is None else f"LoRA r{rank}"
    return (words if delta.sums else "zero") + (", DoRA" if delta.magnitude is not None else "")


def _sum_words(terms: KronTerms) -> str:
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
    """Parameters and bytes that the delta is stored in; the constant A = [[1]] of a LoRA is not counted."""
    tensors = [t for s in delta.sums for t in _counted(s)]
    tensors += [] if delta.magnitude is None else [delta.magnitude]
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


def _counted(terms: KronTerms) -> tuple[Tensor, ...]:
    constant = terms.shape[:2] == (1, 1) and isinstance(terms.right, LowRank)
    return factor_tensors(terms.right) if constant else terms.tensors
