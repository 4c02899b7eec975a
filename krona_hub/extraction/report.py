"""Results of an extraction, measured per layer and in total, with changes outside the adapter. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path

from krona_hub.conversion.report import VERDICTS

NO_FORM = "nothing"  # factorization of a layer without terms above the noise


@dataclass(frozen=True)
class ExtractedLayer:
    """One layer that differs, and how much of the difference the adapter captures."""

    layer: str  # canonical name
    form: str  # factorization: "LoRA r4", "2 × 8x8 ⊗ 40x96"; NO_FORM if none
    terms: int  # Kronecker terms, or the rank of a LoRA; 0 if none
    parameters: int
    bytes: int
    weight_shape: tuple[int, ...]
    norm: float  # ‖Δ‖ of the difference Δ = tuned − base, Frobenius
    relative_norm: float  # ‖Δ‖ / ‖W‖: relative change of the layer
    relative_error: float  # ‖ΔW − Δ‖ / ‖Δ‖, measured on the numbers that are written
    beyond_rounding: float  # the same error beyond what rounding `tuned` to its stored dtype explains
    note: str = ""

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense difference."""
        size = 1
        for n in self.weight_shape:
            size *= n
        return size


@dataclass(frozen=True)
class OtherChange:
    """A changed tensor other than the weight of a linear layer or convolution."""

    name: str  # canonical if known, else the name in the file
    kind: str  # "norm", "bias", "embedding" or "other"
    shape: tuple[int, ...]
    relative_norm: float  # ‖difference‖ / ‖base‖; inf if the base is zero
    storable: bool = True  # not a buffer of integers, nor a tensor whose name is unknown
    kept: bool = False  # whether the adapter stores its difference (--also-vectors)

    @property
    def parameters(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ExtractionReport:
    """Result of `extract`, or of its dry run."""

    base: str
    tuned: str
    target_format: str
    out: Path
    method: str  # how shapes and terms were chosen
    layers: tuple[ExtractedLayer, ...]  # those that differ by more than rounding
    unchanged: int  # layers that are equal
    at_rounding: tuple[str, ...]  # layers that differ only by rounding; they are omitted
    others: tuple[OtherChange, ...] = ()  # changed norms, biases, embeddings
    notes: tuple[str, ...] = ()
    checked: str = ""  # the read-back check, in words
    written: bool = False
    files: tuple[Path, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(x.parameters for x in self.layers)

    @property
    def bytes(self) -> int:
        return sum(x.bytes for x in self.layers)

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense difference, over the layers that differ."""
        return sum(x.dense_parameters for x in self.layers)

    @property
    def relative_error(self) -> float:
        """Relative error over all layers: √Σ‖errorₗ‖² / √Σ‖Δₗ‖²."""
        return _total(self.layers, lambda x: x.relative_error)

    @property
    def beyond_rounding(self) -> float:
        """Total error beyond the rounding of the tuned checkpoint; LossyError depends on it."""
        return _total(self.layers, lambda x: x.beyond_rounding)

    @property
    def energy_kept(self) -> float:
        """Retained energy, 1 − relative_error²: the share of ‖Δ‖² in the adapter."""
        return max(0.0, 1 - self.relative_error**2)

    @property
    def captured(self) -> tuple[OtherChange, ...]:
        """Changes that the adapter stores: vectors, and embeddings in its extras."""
        return tuple(x for x in self.others if x.kept)

    @property
    def not_captured(self) -> tuple[OtherChange, ...]:
        """Changes that are not in the adapter."""
        return tuple(x for x in self.others if not x.kept)

    @property
    def verdict(self) -> str:
        """The result in two sentences: the accuracy and the size."""
        words = next(words for limit, words in VERDICTS if self.beyond_rounding <= limit)
        share = self.parameters / self.dense_parameters if self.dense_parameters else 0.0
        return f"{words} {self.parameters:,} parameters ({100 * share:.2f} % of the dense difference)."


def _total(layers: Sequence[ExtractedLayer], error: Callable[[ExtractedLayer], float]) -> float:
    whole = sum(x.norm**2 for x in layers)
    lost = sum((error(x) * x.norm) ** 2 for x in layers)
    return sqrt(lost / whole) if whole else 0.0
