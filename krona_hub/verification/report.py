"""What `verify` found: one report per question, each with `same`, an exit code and a verdict in words. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Literal

SAME, MISFIT, DIFFERS = 0, 5, 6  # exit codes

# --- does this checkpoint contain exactly that? ----------------------------------------------------------------------

State = Literal[
    "same",  # equal to round(base + Σ w·ΔW) within one unit in the last place; untouched: the base's bytes
    "not merged",  # still the base's numbers
    "other strength",  # round(base + Σ s·ΔW) for other s, which `strengths` says
    "rounded otherwise",  # the right strengths, and more than one unit off: another tool's arithmetic
    "differs",  # neither
    "touched",  # changed, though no adapter is for it
    "missing",  # in the base and not in the merged checkpoint
    "added",  # in the merged checkpoint and not in the base
    "other shape",
]


@dataclass(frozen=True)
class TensorCheck:
    """One tensor of the merged checkpoint, compared."""

    tensor: str  # its name in the file
    file: str  # inside the checkpoint; its own name where that is a file
    state: State
    touched: bool  # whether an adapter is for it
    elements: int
    unequal: int = 0  # elements that are not equal bit for bit
    worst_units: float = 0  # largest distance, in units in the last place; inf beside what is not finite
    strengths: tuple[float, ...] = ()  # found, one per adapter, NaN for one without a delta here; () where as asked
    unexplained: float | None = None  # ‖what those strengths leave of the difference from the base‖ / ‖it‖


@dataclass(frozen=True)
class MergeCheck:
    """Whether MERGED is BASE with the adapters at their strengths."""

    merged: Path
    base: Path
    adapters: tuple[str, ...]
    weights: tuple[float, ...]  # asked
    matched: tuple[str, ...]  # per adapter, "N of M modules …"
    tensors: tuple[TensorCheck, ...]  # every tensor of either
    strengths: tuple[float, ...] = ()  # found over all touched tensors that differ; () where none does
    notes: tuple[str, ...] = ()
    question: Literal["merge"] = "merge"

    @property
    def same(self) -> bool:
        return not self.different

    @property
    def different(self) -> tuple[TensorCheck, ...]:
        """What is not as it should be."""
        return tuple(t for t in self.tensors if t.state != "same")

    @property
    def states(self) -> Mapping[str, int]:
        """State -> number of tensors."""
        found = [t.state for t in self.tensors]
        return {state: found.count(state) for state in dict.fromkeys(found)}

    @property
    def exit_code(self) -> int:
        return SAME if self.same else DIFFERS


# --- do these two adapters mean the same? ----------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCheck:
    """The ΔW of one layer in two adapters."""

    layer: str
    first: str | None  # the form in words: "LoRA r16", "64x4 ⊗ 5x80"; None where the adapter has no such layer
    second: str | None
    relative_difference: float  # ‖ΔW₂ − ΔW₁‖ / ‖ΔW₁‖, Frobenius; inf where only the first is zero
    norm: float  # ‖ΔW₁‖
    difference: float  # ‖ΔW₂ − ΔW₁‖
    same: bool


@dataclass(frozen=True)
class DeltaCheck:
    """Whether two adapters mean the same ΔW."""

    first: str
    second: str
    formats: tuple[str | None, str | None]
    tolerance: float  # relative, per layer
    layers: tuple[LayerCheck, ...]  # of either
    scale: float | None = None  # of a second that is nearly scale · first; None where they are the same
    cosine: float | None = None  # ⟨ΔW₁, ΔW₂⟩ / ‖ΔW₁‖‖ΔW₂‖ over all layers; None where they are the same
    notes: tuple[str, ...] = ()
    question: Literal["delta"] = "delta"

    @property
    def same(self) -> bool:
        return all(x.same for x in self.layers)

    @property
    def different(self) -> tuple[LayerCheck, ...]:
        return tuple(x for x in self.layers if not x.same)

    @property
    def only_first(self) -> tuple[str, ...]:
        """Layers that the second adapter lacks."""
        return tuple(x.layer for x in self.layers if x.second is None)

    @property
    def only_second(self) -> tuple[str, ...]:
        """Layers that the first adapter lacks."""
        return tuple(x.layer for x in self.layers if x.first is None)

    @property
    def relative_difference(self) -> float:
        """Over all layers together: √Σ‖ΔW₂ − ΔW₁‖² / √Σ‖ΔW₁‖²."""
        whole, difference = _root([x.norm for x in self.layers]), _root([x.difference for x in self.layers])
        return difference / whole if whole else (0.0 if not difference else float("inf"))

    @property
    def exit_code(self) -> int:
        return SAME if self.same else DIFFERS


def _root(values: Sequence[float]) -> float:
    return sqrt(sum(value**2 for value in values))


# --- does this adapter fit that base? --------------------------------------------------------------------------------


@dataclass(frozen=True)
class FitCheck:
    """Whether every layer of an adapter is in the base, with its shape. From headers alone."""

    adapter: Path
    base: str  # its catalogue name, or where it is
    format: str
    matched: int  # modules whose layers the base has, with these shapes
    total: int  # modules
    problems: Mapping[str, str] = field(default_factory=dict)  # module -> why it does not fit
    coverage: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # component -> layers adapted, layers
    recorded: str | None = None  # the base that the file names
    fingerprint_agrees: bool | None = None  # whether `recorded` may be this base; None where nothing is recorded
    fits_instead: tuple[str, ...] = ()  # catalogue names that it fits where it does not fit this one
    notes: tuple[str, ...] = ()
    question: Literal["fit"] = "fit"

    @property
    def same(self) -> bool:
        """Whether it fits."""
        return not self.problems and self.fingerprint_agrees is not False and self.matched == self.total

    @property
    def exit_code(self) -> int:
        return SAME if self.same else MISFIT


VerifyReport = MergeCheck | DeltaCheck | FitCheck
