"""Results of `verify`: one report per comparison, each with `same` and an exit code. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Literal

SAME, MISFIT, DIFFERS = 0, 5, 6  # exit codes

# --- merged checkpoints ----------------------------------------------------------------------------------------------

State = Literal[
    "same",  # equal to round(base + Σ w·ΔW) within 1 ULP; if untouched, equal to the base
    "not merged",  # still equal to the base
    "other strength",  # round(base + Σ s·ΔW) for other s, given in `strengths`
    "rounded otherwise",  # the right strengths, but more than 1 ULP apart: other arithmetic
    "differs",  # none of these
    "touched",  # changed, although no adapter targets it
    "missing",  # only in the base
    "added",  # only in the merged checkpoint
    "other shape",
]


@dataclass(frozen=True)
class TensorCheck:
    """One tensor of the merged checkpoint, compared."""

    tensor: str  # its name in the file
    file: str  # relative to the checkpoint; the name of a single file
    state: State
    touched: bool  # whether an adapter targets it
    elements: int
    unequal: int = 0  # elements that are not equal bit for bit
    worst_units: float = 0  # maximum error in ULP; inf if only one of the two is finite
    strengths: tuple[float, ...] = ()  # estimated, one per adapter, NaN without a delta here; () if as requested
    unexplained: float | None = None  # ‖difference from the base not explained by them‖ / ‖difference‖


@dataclass(frozen=True)
class MergeCheck:
    """Whether the merged checkpoint is the base with the adapters at their strengths."""

    merged: Path
    base: Path
    adapters: tuple[str, ...]
    weights: tuple[float, ...]  # requested strengths
    matched: tuple[str, ...]  # per adapter, "N of M modules …", with its vectors
    tensors: tuple[TensorCheck, ...]  # all tensors of both
    strengths: tuple[float, ...] = ()  # estimated over all touched tensors that differ; () if none does
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()  # parts of the adapters that were not compared: not recognized, or without a place
    question: Literal["merge"] = "merge"

    @property
    def same(self) -> bool:
        return not self.different

    @property
    def different(self) -> tuple[TensorCheck, ...]:
        """Tensors with unexpected values."""
        return tuple(t for t in self.tensors if t.state != "same")

    @property
    def states(self) -> Mapping[str, int]:
        """State -> number of tensors."""
        found = [t.state for t in self.tensors]
        return {state: found.count(state) for state in dict.fromkeys(found)}

    @property
    def exit_code(self) -> int:
        return SAME if self.same else DIFFERS


# --- two adapters ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCheck:
    """The ΔW of one layer, or of one vector, in two adapters."""

    layer: str  # canonical; for a vector the name of its parameter
    first: str | None  # factorization: "LoRA r16", "64x4 ⊗ 5x80"; None if the adapter lacks the layer
    second: str | None
    relative_difference: float  # ‖ΔW₂ − ΔW₁‖ / ‖ΔW₁‖, Frobenius; inf if only the first is zero
    norm: float  # ‖ΔW₁‖
    difference: float  # ‖ΔW₂ − ΔW₁‖
    same: bool


@dataclass(frozen=True)
class DeltaCheck:
    """Whether two adapters have the same ΔW."""

    first: str
    second: str
    formats: tuple[str | None, str | None]
    tolerance: float  # relative, per layer
    layers: tuple[LayerCheck, ...]  # all layers of both
    scale: float | None = None  # s that brings s · first nearest to the second; None if they are the same
    cosine: float | None = None  # ⟨ΔW₁, ΔW₂⟩ / ‖ΔW₁‖‖ΔW₂‖ over all layers and vectors; None if same
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()  # parts of the adapters that were not compared: not recognized, or without a place
    question: Literal["delta"] = "delta"
    vectors: tuple[LayerCheck, ...] = ()  # all vectors of both, by parameter

    @property
    def compared(self) -> tuple[LayerCheck, ...]:
        """All layers and vectors."""
        return (*self.layers, *self.vectors)

    @property
    def same(self) -> bool:
        return all(x.same for x in self.compared)

    @property
    def different(self) -> tuple[LayerCheck, ...]:
        return tuple(x for x in self.compared if not x.same)

    @property
    def only_first(self) -> tuple[str, ...]:
        """Layers and parameters that the second adapter lacks."""
        return tuple(x.layer for x in self.compared if x.second is None)

    @property
    def only_second(self) -> tuple[str, ...]:
        """Layers and parameters that the first adapter lacks."""
        return tuple(x.layer for x in self.compared if x.first is None)

    @property
    def relative_difference(self) -> float:
        """Relative difference over all layers and vectors: √Σ‖ΔW₂ − ΔW₁‖² / √Σ‖ΔW₁‖²."""
        whole, difference = _root([x.norm for x in self.compared]), _root([x.difference for x in self.compared])
        return difference / whole if whole else (0.0 if not difference else float("inf"))

    @property
    def exit_code(self) -> int:
        return SAME if self.same else DIFFERS


def _root(values: Sequence[float]) -> float:
    return sqrt(sum(value**2 for value in values))


# --- an adapter and a base model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FitCheck:
    """Whether the base has every layer and parameter that an adapter changes, with its shape. From headers alone."""

    adapter: Path
    base: str  # catalog name or path
    format: str
    matched: int  # modules whose layers and shapes match
    total: int  # modules
    problems: Mapping[str, str] = field(default_factory=dict)  # module -> why it does not fit
    coverage: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # component -> layers adapted, layers
    recorded: str | None = None  # base model recorded in the file
    fingerprint_agrees: bool | None = (
        None  # whether `recorded` is compatible with this base; None if nothing is recorded
    )
    fits_instead: tuple[str, ...] = ()  # catalog names that it fits instead, if it does not fit this one
    notes: tuple[str, ...] = ()
    question: Literal["fit"] = "fit"
    matched_vectors: int = 0  # vectors whose parameters and sizes match
    total_vectors: int = 0

    @property
    def same(self) -> bool:
        """Whether the adapter fits the base."""
        complete = (self.matched, self.matched_vectors) == (self.total, self.total_vectors)
        return complete and not self.problems and self.fingerprint_agrees is not False

    @property
    def exit_code(self) -> int:
        return SAME if self.same else MISFIT


VerifyReport = MergeCheck | DeltaCheck | FitCheck
