"""What a layer's delta looks like as numbers only, and which formats can hold such a form. Torch-free.

The form of a layer is its sizes: splits, terms, ranks, row order, DoRA axis. Every rule of the kind "this format
cannot hold that" is a question about the form, and stands in this file; the values never matter to it.
"""

from __future__ import annotations

from collections.abc import Iterable

from krona_hub.formats.forms.delta_form import ChannelSplit, LayerFactorization
from krona_hub.formats.known.registry import storage_of
from krona_hub.kron.shapes import lycoris_factors, peft_factors


def refusal(form: LayerFactorization, format_name: str) -> str | None:
    """Why files of this format cannot hold this form exactly, as a clause; None where they can.

    >>> from krona_hub.formats.forms.delta_form import SumFactorization
    >>> from krona_hub.kron.shapes import KronShape
    >>> refusal(LayerFactorization((8, 6), (SumFactorization(KronShape(2, 2, 4, 3)),)), "kohya-lora")
    'it is a Kronecker sum (2x2 ⊗ 4x3, 1 term) and no product up·down'
    >>> refusal(LayerFactorization((8, 6), (SumFactorization(KronShape(2, 2, 4, 3)),)), "lycoris-lokr") is None
    True
    """
    return next((why for limit in storage_of(format_name).limits if (why := limit(form))), None)


def common_peft_factor(splits: Iterable[ChannelSplit]) -> int | None:
    """The `decompose_factor` under which PEFT derives exactly these splits; None where no single one does.

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
    """Whether LyCORIS derives this split again when it builds a module from a file.

    It guesses its `factor` from the tensors. `kernel` is k·k… where w2 is stored as a product, whose second half
    (r, d·k·k) makes LyCORIS see d·k·k input channels while it guesses; else 1.

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
