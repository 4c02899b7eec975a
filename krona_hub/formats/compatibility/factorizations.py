"""Which factorizations an application or a format accepts. Torch-free.

Whether a delta can be written for an application depends on its factorization alone, never on its values.
"""

from __future__ import annotations

from krona_hub.formats.compatibility.applications import APPLICATIONS, file_format
from krona_hub.formats.compatibility.format_limits import refusal
from krona_hub.formats.compatibility.rules import RULES
from krona_hub.formats.forms.delta_form import LayerFactorization, SumFactorization
from krona_hub.kron.shapes import KronShape


def loads_form(
    target: str,
    size: tuple[int, ...],
    shape: KronShape,
    terms: int = 1,
    right_rank: int | None = None,
    left_rank: int | None = None,
) -> bool:
    """Whether `target`, an application or a format, accepts this factorization of a layer of weight shape `size`.

    Covers rules about single layers only; the writer checks those about all layers, such as that of PEFT.

    >>> size, wide, lora = (320, 768), KronShape(64, 4, 5, 192), KronShape(1, 1, 320, 768)
    >>> loads_form("comfyui", size, wide), loads_form("peft", size, wide), loads_form("nunchaku", size, wide)
    (True, False, False)
    >>> loads_form("comfyui", size, wide, terms=7), loads_form("krona", size, wide, terms=7)
    (False, True)
    >>> loads_form("nunchaku", size, lora, right_rank=4)
    True
    """
    form = LayerFactorization(size, (SumFactorization(shape, terms, left_rank, right_rank),))
    return why_not_form(form, target) is None


def why_not_form(form: LayerFactorization, target: str) -> str | None:
    """Why `target`, an application or a format, does not accept this factorization, as a clause; None if it does."""
    if target not in APPLICATIONS:
        return refusal(form, target)
    known = APPLICATIONS[target]
    goal = file_format(known, is_lora=form.lora_rank is not None, has_dora=form.dora is not None)
    if goal is None:
        return f"{known.title} loads LoRA only, and {refusal(form, 'kohya-lora')}"
    limits = (RULES[name].form for name in known.rules)
    return next((why for limit in limits if limit and (why := limit(form))), None) or refusal(form, goal)
