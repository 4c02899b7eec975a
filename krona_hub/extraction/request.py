"""The request of `extract` as values: what to compare, and how to fit the difference of a layer. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from krona_hub.conversion.methods import Budget, parse_budget
from krona_hub.errors import UsageError
from krona_hub.kron.shapes import parse_shape

AUTO = "auto"


@dataclass(frozen=True)
class FitRequest:
    """How to fit a layer: at most one of `terms`, `max_error` and `budget`; without them down to the rounding noise.

    `terms` is the exact number with a shape, and the maximum without one.
    """

    shape: tuple[int, int] | None = None  # (a1, a2); None: all shapes and LoRA
    terms: int | None = None
    max_error: float | None = None  # relative, per layer
    budget: Budget | None = None
    fallback: bool = False  # use the nearest shape for layers that this one does not divide

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) if self.shape else AUTO
        return f"extract, shape {shape}, {self._limit}"

    @property
    def _limit(self) -> str:
        if self.terms is not None:
            return f"{self.terms} terms" if self.shape else f"at most {self.terms} terms"
        if self.max_error is not None:
            return f"error at most {self.max_error:g} per layer"
        if self.budget is not None:
            return f"budget {self.budget}"
        return "down to the rounding noise"


@dataclass(frozen=True)
class ExtractRequest:
    """A requested extraction, with consistent options."""

    base: str  # as given by the caller
    tuned: str
    base_path: Path
    tuned_path: Path
    out: Path
    fit: FitRequest
    format: str  # a name of FORMATS
    component: str | None
    targets: str | Sequence[str] | None  # named sets of layers, or regular expressions
    also_vectors: bool
    base_name: str | Path | None
    dtype: str | None  # torch's name
    allow_loss: bool
    overwrite: bool
    threads: int | None
    dry_run: bool


def fit_request(
    shape: str | tuple[int, int],
    terms: int | None,
    max_error: float | None,
    budget: str | int | None,
    shape_fallback: str | None,
) -> FitRequest:
    """Return the options as one value. Raises UsageError if they contradict each other.

    >>> str(fit_request("8x8", None, None, None, None)), fit_request("auto", 4, None, None, None).terms
    ('extract, shape 8x8, down to the rounding noise', 4)
    """
    given = {"--terms": terms, "--max-error": max_error, "--budget": budget}
    named = [flag for flag, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} exclude each other.", fix="Choose at most one of them.")
    if terms is not None and terms < 1:
        raise UsageError(f"Invalid value {terms} for --terms.", fix="Use an integer of at least 1.")
    if max_error is not None and not 0 <= max_error < 1:
        raise UsageError(
            f"Invalid value {max_error} for --max-error.", fix="Use a relative error from 0 to below 1, such as 0.05."
        )
    if shape_fallback not in (None, "nearest"):
        raise UsageError(f"Unknown shape fallback {shape_fallback!r}.", fix="Use --shape-fallback nearest.")
    parsed = None if shape == AUTO else parse_shape(shape) if isinstance(shape, str) else shape
    if parsed is None and shape_fallback:
        raise UsageError("--shape-fallback requires --shape a1xa2.", fix="Omit it with --shape auto.")
    return FitRequest(
        parsed, terms, max_error, None if budget is None else parse_budget(budget), shape_fallback is not None
    )
