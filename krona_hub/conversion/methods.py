"""Conversion methods as plain values, checked before any file is read. Torch-free.

`str` of a method is the command that selects it; the output file records it as provenance.
"""

from __future__ import annotations

from dataclasses import dataclass

from krona_hub.errors import UsageError
from krona_hub.kron.shapes import parse_shape

DEFAULT_MAX_ERROR = 0.05  # relative Frobenius error per layer


@dataclass(frozen=True)
class Keep:
    """Keep the factors and change only names and layout."""

    def __str__(self) -> str:
        return "convert"


@dataclass(frozen=True)
class Exact:
    """An equal delta up to rounding, in the target's kind."""

    def __str__(self) -> str:
        return "convert --exact"


@dataclass(frozen=True)
class FixedShape:
    """One shape of A for every layer: the nearest Kronecker product (Van Loan & Pitsianis, 1993)."""

    a1: int
    a2: int
    terms: int = 1
    fallback: bool = False  # use the nearest shape for layers that this one does not divide

    def __str__(self) -> str:
        terms = f" --terms {self.terms}" if self.terms > 1 else ""
        return f"convert --shape {self.a1}x{self.a2}{terms}{' --shape-fallback nearest' if self.fallback else ''}"


@dataclass(frozen=True)
class MaxError:
    """The smallest factorization per layer with a relative error of at most `value`."""

    value: float = DEFAULT_MAX_ERROR

    def __str__(self) -> str:
        return f"convert --max-error {self.value:g}"


@dataclass(frozen=True)
class Budget:
    """The smallest total error for a number of parameters or a share of the source's; layers may be left out."""

    parameters: int | None = None
    share: float | None = None

    def __str__(self) -> str:
        size = f"{self.parameters}" if self.parameters is not None else f"{100 * (self.share or 0):.6g}%"
        return f"convert --budget {size}"

    def of(self, parameters: int) -> int:
        """Return the budget in parameters, for a source with `parameters` of them."""
        return self.parameters if self.parameters is not None else round((self.share or 0) * parameters)


@dataclass(frozen=True)
class Rank:
    """The best LoRA of a fixed rank per layer."""

    value: int

    def __str__(self) -> str:
        return f"convert --rank {self.value}"


Method = Keep | Exact | FixedShape | MaxError | Budget | Rank


def choose_method(
    *,
    shape: str | tuple[int, int] | None = None,
    terms: int = 1,
    shape_fallback: str | None = None,
    max_error: float | None = None,
    budget: str | int | None = None,
    exact: bool = False,
    rank: int | None = None,
) -> Method | None:
    """Return the method that the options select, None if they select none. Raises UsageError if they select two.

    >>> choose_method(shape="64x4", terms=2)
    FixedShape(a1=64, a2=4, terms=2, fallback=False)
    >>> choose_method(budget="50%")
    Budget(parameters=None, share=0.5)
    """
    given = {"--shape": shape, "--max-error": max_error, "--budget": budget, "--exact": exact or None, "--rank": rank}
    named = [flag for flag, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} exclude each other.", fix="Choose at most one method.")
    if shape is None and (terms != 1 or shape_fallback is not None):
        raise UsageError("--terms and --shape-fallback require --shape.", fix="Add --shape, for example --shape 64x4.")
    if shape is not None:
        return _fixed(shape, terms, shape_fallback)
    if max_error is not None:
        return MaxError(_fraction("--max-error", max_error))
    if budget is not None:
        return parse_budget(budget)
    if rank is not None:
        return Rank(_positive("--rank", rank))
    return Exact() if exact else None


def parse_budget(text: str | int) -> Budget:
    """Read `50%` or `1/2` as a share, and `2000000` or `2_000_000` as parameters. Raises UsageError for other texts.

    >>> parse_budget("2_000_000").of(7), parse_budget("12.5%").of(8000), parse_budget("1/8")
    (2000000, 1000, Budget(parameters=None, share=0.125))
    """
    words = str(text).strip().replace(",", "")
    try:
        if words.endswith("%"):
            return Budget(share=_share(float(words[:-1]) / 100))
        if "/" in words:
            part, whole = (_positive("--budget", int(number)) for number in words.split("/"))
            return Budget(share=_share(part / whole))
        return Budget(parameters=_positive("--budget", int(words)))
    except (ValueError, OverflowError):  # UsageError is a ValueError
        raise UsageError(
            f"Invalid budget {text!r}.",
            fix="Use a share such as 50% or 1/8, or a number of parameters such as 2000000.",
        ) from None


def _share(value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _fixed(shape: str | tuple[int, int], terms: int, fallback: str | None) -> FixedShape:
    a1, a2 = parse_shape(shape) if isinstance(shape, str) else shape
    if fallback not in (None, "nearest"):
        raise UsageError(f"Unknown shape fallback {fallback!r}.", fix="Use --shape-fallback nearest.")
    return FixedShape(a1, a2, _positive("--terms", terms), fallback == "nearest")


def _positive(flag: str, value: int) -> int:
    if value < 1:
        raise UsageError(f"Invalid value {value} for {flag}.", fix="Use an integer of at least 1.")
    return value


def _fraction(flag: str, value: float) -> float:
    if not 0 <= value < 1:
        raise UsageError(
            f"Invalid value {value} for {flag}.", fix="Use a relative error from 0 to below 1, such as 0.05."
        )
    return value
