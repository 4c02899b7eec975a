"""Which formats can store a layer's factorization. Torch-free.

A factorization is sizes only: shapes, terms, ranks, row order, DoRA axis. Whether a format can store a delta depends
on its factorization alone, never on its values; the rules per format are in `forms.limits`.
"""

from __future__ import annotations

from collections.abc import Iterable

from krona_hub.formats.forms.delta_form import ChannelSplit, LayerFactorization
from krona_hub.formats.known.registry import storage_of
from krona_hub.kron.shapes import lycoris_factors, peft_factors


def refusal(form: LayerFactorization, format_name: str) -> str | None:
    """Why a file of this format cannot store this factorization exactly, as a clause; None if it can.

    >>> from krona_hub.formats.forms.delta_form import SumFactorization
    >>> from krona_hub.kron.shapes import KronShape
    >>> refusal(LayerFactorization((8, 6), (SumFactorization(KronShape(2, 2, 4, 3)),)), "kohya-lora")
    'it is a Kronecker sum (2x2 ⊗ 4x3, 1 term), not a product up·down'
    >>> refusal(LayerFactorization((8, 6), (SumFactorization(KronShape(2, 2, 4, 3)),)), "lycoris-lokr") is None
    True
    """
    return next((why for limit in storage_of(format_name).limits if (why := limit(form))), None)


def common_peft_factor(splits: Iterable[ChannelSplit]) -> int | None:
    """The `decompose_factor` from which PEFT derives exactly these splits; None if no single value does.

    >>> common_peft_factor([ChannelSplit((4, 80), (4, 192))])
    4
    >>> common_peft_factor([ChannelSplit((64, 5), (4, 192))]) is None
    True
    """
    wanted = {pair for split in splits for pair in split}
    largest = max((a for a, _ in wanted), default=1)
    candidates: tuple[int, ...] = (-1, *range(1, largest + 1))
    for factor in candidates:
        if all(peft_factors(a * b, factor) == (a, b) for a, b in wanted):
            return factor
    return None


def lycoris_resumes(split: ChannelSplit, kernel: int = 1) -> bool:
    """Whether LyCORIS derives the same split when it builds a module from a file.

    LyCORIS guesses its `factor` from the tensors. `kernel` is k·k… if w2 is stored as a product, because its second
    half (r, d·k·k) makes LyCORIS see d·k·k input channels during the guess; else 1.

    >>> lycoris_resumes(ChannelSplit((4, 80), (4, 192))), lycoris_resumes(ChannelSplit((64, 5), (4, 192)))
    (True, False)
    """
    (a1, b1), (a2, channels) = split
    b2 = channels * kernel
    out, in_ = a1 * b1, a2 * b2
    if (a1, a2) == (lycoris_factors(out)[0], lycoris_factors(in_)[0]):
        guess = -1
    else:
        left, right = max(a1, a2), max(b1, b2)
        guess = next((f for f in (left, right) if f in (a1, b1) and f in (a2, b2)), min(left, right))
    return lycoris_factors(out, guess) == (a1, b1) and lycoris_factors(a2 * channels, guess) == (a2, channels)
