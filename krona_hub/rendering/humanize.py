"""Numbers and forms in words, for the screen and for pages. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from krona_hub.formats.compatibility.format_limits import SumForm
    from krona_hub.formats.reading.describe import ModuleInfo


def human_bytes(count: int) -> str:
    """A size in the unit a person would choose, decimal.

    >>> human_bytes(512), human_bytes(3_227_336), human_bytes(5_500_000_000)
    ('512 B', '3.2 MB', '5.5 GB')
    """
    size, units = float(count), ["B", "kB", "MB", "GB"]
    while size >= 999.95 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def percent(share: float) -> str:
    """A share of one as a percentage that keeps nearly nothing apart from nothing, and nearly all from all.

    >>> percent(0.5), percent(0.0123), percent(0.00004), percent(0.0)
    ('50 %', '1.2 %', '0.004 %', '0 %')
    >>> percent(0.99884), percent(1.0)
    ('99.9 %', '100 %')
    """
    if share > 0.99:
        return f"{100 - float(f'{100 * (1 - share):.1g}'):.9g} %"
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.0f} %"


def relative(error: float) -> str:
    """A relative error in few characters.

    >>> relative(0.0), relative(3.2e-7), relative(0.0487)
    ('0', '3.2e-07', '0.049')
    """
    return "0" if error == 0 else f"{error:.2g}"


def rate(nbytes: int, seconds: float) -> str:
    """How long it took, and how fast where that means something.

    >>> rate(5_100_000_000, 3.4), rate(20_000, 0.003)
    ('3.4 s, 1.5 GB/s', '0.0 s')
    """
    speed = f", {human_bytes(round(nbytes / seconds))}/s" if nbytes > 100_000_000 and seconds > 0 else ""
    return f"{seconds:.1f} s{speed}"


def form_in_words(module: ModuleInfo) -> str:
    """The form of a module as the tables show it: rank of a LoRA, split, terms and ranks of a Kronecker sum."""
    return " + ".join(_sum_in_words(s) for s in module.sums) or "magnitude only"


def _sum_in_words(s: SumForm) -> str:
    if (s.shape.a1, s.shape.a2) == (1, 1) and s.right_rank is not None:
        return f"{s.shape.b1}x{s.shape.b2} r{s.right_rank}"
    terms = f"{s.terms} terms of " if s.terms > 1 else ""
    ranks = [f"{side} r{rank}" for side, rank in (("A", s.left_rank), ("B", s.right_rank)) if rank is not None]
    rows = ["rows shuffled"] if s.rows == "shuffled" else []
    return ", ".join([f"{terms}{s.shape}", *ranks, *rows])


def scale_in_words(module: ModuleInfo) -> str:
    """`alpha 4 / rank 8 = 0.5`, or the scale alone where no alpha is involved."""
    if module.alpha is None or module.rank is None:
        return f"{module.scale:g}"
    return f"alpha {module.alpha:g} / rank {module.rank} = {module.scale:g}"
