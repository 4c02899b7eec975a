"""What an extraction found, measured: per layer, in total, and what no adapter holds. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from krona_hub.conversion.report import VERDICTS

NO_FORM = "nothing"  # the form of a layer of which nothing stands above the noise


@dataclass(frozen=True)
class ExtractedLayer:
    """One layer that differs, and how much of the difference its adapter holds."""

    layer: str  # canonical name
    form: str  # in words: "LoRA r4", "2 × 8x8 ⊗ 40x96"; NO_FORM where nothing was taken
    terms: int  # Kronecker terms; of a LoRA its rank; 0 where nothing was taken
    parameters: int
    bytes: int
    weight_shape: tuple[int, ...]
    norm: float  # ‖Δ‖ of the difference Δ = tuned − base, Frobenius
    relative_norm: float  # ‖Δ‖ / ‖W‖: how far the layer moved
    relative_error: float  # ‖ΔW − Δ‖ / ‖Δ‖, measured on the numbers that are written
    beyond_rounding: float  # the same error where each number may also be off by what storing `tuned` rounded away
    note: str = ""

    @property
    def dense_parameters(self) -> int:
        """Numbers of the whole difference."""
        size = 1
        for n in self.weight_shape:
            size *= n
        return size


@dataclass(frozen=True)
class OtherChange:
    """A changed tensor that is no delta of a linear layer or convolution."""

    name: str  # canonical where it is known, else the name in the file
    kind: str  # "norm", "bias", "embedding" or "other"
    shape: tuple[int, ...]
    relative_norm: float  # ‖difference‖ / ‖base's‖; inf where the base's is zero
    kept: bool = False  # whether its difference is in the adapter's extras (--also-vectors)


@dataclass(frozen=True)
class ExtractionReport:
    """What `extract` did, or would do."""

    base: str
    tuned: str
    target_format: str
    out: Path
    method: str  # in words: how shapes and terms were chosen
    layers: tuple[ExtractedLayer, ...]  # those that differ by more than rounding
    unchanged: int  # layers that are equal
    at_rounding: tuple[str, ...]  # layers that differ by nothing but rounding; they are left out
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
        """Numbers of the whole difference, over the layers that differ."""
        return sum(x.dense_parameters for x in self.layers)

    @property
    def relative_error(self) -> float:
        """Over all layers together: √Σ‖errorₗ‖² / √Σ‖Δₗ‖²."""
        return _total(self.layers, lambda x: x.relative_error)

    @property
    def beyond_rounding(self) -> float:
        """The total error that the rounding of the tuned checkpoint does not explain; what the refusal looks at."""
        return _total(self.layers, lambda x: x.beyond_rounding)

    @property
    def energy_kept(self) -> float:
        """1 − relative_error²: the share of ‖Δ‖² that the adapter holds."""
        return max(0.0, 1 - self.relative_error**2)

    @property
    def not_captured(self) -> tuple[OtherChange, ...]:
        """Changes that are not in the adapter."""
        return tuple(x for x in self.others if not x.kept)

    @property
    def verdict(self) -> str:
        """The result in a sentence or two: how true it is, and what it costs."""
        words = next(words for limit, words in VERDICTS if self.beyond_rounding <= limit)
        share = self.parameters / self.dense_parameters if self.dense_parameters else 0.0
        return f"{words} {share:.2%} of the parameters of the whole difference."


def _total(layers: Sequence[ExtractedLayer], error: Callable[[ExtractedLayer], float]) -> float:
    whole = sum(x.norm**2 for x in layers)
    lost = sum((error(x) * x.norm) ** 2 for x in layers)
    return sqrt(lost / whole) if whole else 0.0
