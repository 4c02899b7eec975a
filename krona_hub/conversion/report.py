"""Results of a conversion, measured per layer and in total, with a verdict in words. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Protocol

from krona_hub.conversion.effect_report import EffectReport
from krona_hub.errors import counted
from krona_hub.formats.forms.left_out import COMPLETE, LeftOut

REFUSED_ABOVE = 0.5  # total relative error
LEFT_OUT = "left out"  # factorization of a layer that the result does not have


@dataclass(frozen=True)
class LayerReport:
    """One layer, before and after."""

    layer: str
    before: str  # factorization: "LoRA r16", "64x4 ⊗ 5x80"
    after: str
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    relative_error: float  # ‖ΔW′ − ΔW‖ / ‖ΔW‖, Frobenius, measured on the written values
    norm: float  # ‖ΔW‖
    note: str = ""
    best_other: str | None = None  # best alternative, for a layer kept as LoRA

    @property
    def is_left_out(self) -> bool:
        """Whether the budget left the layer out: its relative error is 1, or 0 if its delta is zero."""
        return self.after == LEFT_OUT


class Totals:
    """Mixin for a report with `layers`: their totals, the overall error and the verdict."""

    layers: tuple[LayerReport, ...]
    left_out: LeftOut = COMPLETE
    vector_error: float = 0.0  # relative, over all vectors that the result has

    @property
    def layers_left_out(self) -> int:
        """Layers that a budget left out; they are among `layers`, as an error, unlike the parts in `left_out`."""
        return sum(x.is_left_out for x in self.layers)

    @property
    def kept_and_left_out(self) -> str:
        """What follows the number of layers: " (13 kept, 43 left out)"; "" if the result has all of them."""
        without = self.layers_left_out
        return f" ({len(self.layers) - without:,} kept, {without:,} left out)" if without else ""

    @property
    def parameters_before(self) -> int:
        return sum(x.parameters_before for x in self.layers)

    @property
    def parameters_after(self) -> int:
        return sum(x.parameters_after for x in self.layers)

    @property
    def bytes_before(self) -> int:
        return sum(x.bytes_before for x in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(x.bytes_after for x in self.layers)

    @property
    def relative_error(self) -> float:
        """Relative error over all layers: √Σ‖errorₗ‖² / √Σ‖ΔWₗ‖²; 0.0 if nothing was lost.

        If the vectors have a larger error, for example without any layer, it is theirs.
        """
        return max(total_error(self.layers), self.vector_error)

    @property
    def energy_kept(self) -> float:
        """Retained energy, 1 − relative_error²: the share of ‖ΔW‖² that an orthogonal projection retains."""
        return max(0.0, 1 - self.relative_error**2)

    @property
    def verdict(self) -> str:
        return verdict(self)


@dataclass(frozen=True)
class ConversionReport(Totals):
    """Result of `convert`, or of its dry run."""

    source: str
    source_format: str
    target_format: str
    tool: str | None
    out: Path
    layers: tuple[LayerReport, ...]
    vectors: int = 0  # of the source: changes of biases and norms
    vector_parameters: int = 0  # numbers in these vectors, which the totals of the layers do not count
    vector_error: float = 0.0  # relative, over all vectors that the result has
    left_out: LeftOut = COMPLETE  # parts of the source that the result does not have
    predicted_effect: float | None = None  # share kept by the moments, before the gain; None without moments
    effect_curve: tuple[tuple[int, float], ...] = ()  # (parameters, predicted effect) of cuts of other sizes
    gain: float = 1.0  # factor on all layers, fitted to the effect
    effect: EffectReport | None = None  # measured on held-out prompts
    alternatives: tuple[str, ...] = ()  # measured
    notes: tuple[str, ...] = ()
    checked: str = ""  # the read-back check, in words
    written: bool = False
    files: tuple[Path, ...] = field(default=())

    @property
    def verdict(self) -> str:
        """By the measured effect; else, with moments, by the predicted one; else by the error of the delta."""
        if self.relative_error <= EXACT_BELOW or self.predicted_effect is None:
            return verdict(self)
        if self.effect is None:
            words = f"Predicted to keep {percent(self.predicted_effect)} of the effect; not measured."
        else:
            words = self.effect.verdict
        return with_sizes(self, words)


def worst_layers(layers: Sequence[LayerReport], most: int = 3) -> tuple[LayerReport, ...]:
    """Return the layers with the largest relative error, worst first, without those that were left out.

    None if nothing was lost.
    """
    lossy = [x for x in layers if x.relative_error > EXACT_BELOW and not x.is_left_out]
    return tuple(sorted(lossy, key=lambda x: (-x.relative_error, x.layer))[:most])


def total_error(layers: Sequence[LayerReport]) -> float:
    """Return √Σ(eₗ·nₗ)² / √Σnₗ² over relative errors e and norms n; 0.0 if every delta is zero.

    >>> total_error([])
    0.0
    """
    whole = sum(x.norm**2 for x in layers)
    lost = sum((x.relative_error * x.norm) ** 2 for x in layers)
    return sqrt(lost / whole) if whole else 0.0


EXACT_BELOW = 1e-6  # error that float32 rounding alone explains
VERDICTS = (  # largest relative error, verdict
    (EXACT_BELOW, "Exact: the delta is the same up to rounding."),
    (0.01, "Nearly identical: the delta differs by at most 1 %."),
    (0.05, "Close: small differences may be visible side by side."),
    (0.2, "Noticeably different: expect visible changes in images."),
    (REFUSED_ABOVE, "Very different: much of what the adapter learned is lost."),
    (float("inf"), "Destroyed: the error exceeds half of the norm of the delta."),
)


class Measured(Protocol):
    """A report with an error and two sizes."""

    @property
    def layers(self) -> tuple[LayerReport, ...]: ...
    @property
    def left_out(self) -> LeftOut: ...
    @property
    def relative_error(self) -> float: ...
    @property
    def parameters_before(self) -> int: ...
    @property
    def parameters_after(self) -> int: ...


def verdict(report: Measured) -> str:
    """Return the result in two sentences: the accuracy and the change in size."""
    return with_sizes(report, next(words for limit, words in VERDICTS if report.relative_error <= limit))


def with_sizes(report: Measured, words: str) -> str:
    """Return a verdict in words with what was left out and the change in size."""
    if report.left_out:
        what, _, rest = words.removesuffix(".").partition(":")
        rest = "" if report.relative_error <= EXACT_BELOW else f":{rest}"
        words = f"{what} for {counted(len(report.layers), 'layer')}{rest}; {report.left_out} left out."
    before, after = report.parameters_before, report.parameters_after
    if not before or before == after:
        return f"{words} Same number of parameters."
    if after > 2 * before:
        return f"{words} {after / before:.1f}× as many parameters."
    return f"{words} {after:,} parameters ({'−' if after < before else '+'}{percent(abs(after / before - 1))})."


def percent(share: float) -> str:
    """Return a share as a message states it.

    >>> percent(0.6484)
    '64.8 %'
    """
    return f"{100 * share:.1f} %"
