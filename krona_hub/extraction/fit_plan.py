"""How to fit every layer: the request, and what the target can hold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.conversion.target import ConversionTarget
from krona_hub.errors import InexpressibleError, ShapeError
from krona_hub.extraction.error_curves import Allowed, ErrorCurve, above_noise, within
from krona_hub.extraction.layer_difference import LayerDifference, lora_shape
from krona_hub.extraction.request import FitRequest
from krona_hub.extraction.tensor_pairs import LayerPair
from krona_hub.formats.compatibility.factorizations import loads_form
from krona_hub.formats.known.registry import storage_of
from krona_hub.formats.writing.encode import cast, normalized, why_not
from krona_hub.kron.candidates import Factorization, is_lora
from krona_hub.kron.shapes import KronShape, nearest_split, split


@dataclass(frozen=True)
class FitPlan:
    """The fitting options of all layers."""

    request: FitRequest
    target: ConversionTarget
    dtype: torch.dtype | None  # of the factors; None: float32
    threads: int | None

    @property
    def one_shape(self) -> bool:
        """Whether each layer has only one curve: that of the requested shape, or of a LoRA."""
        return self.request.shape is not None or self.target.to_lora

    def stored(self, delta: LayerDelta) -> LayerDelta:
        """Return a delta as the file stores it; what the target cannot hold, which is reported later, is only cast."""
        holds = bool(delta.sums) and why_not(delta, self.target.format) is None
        return cast(normalized(delta, self.target.format) if holds else delta, self.dtype)

    def curve(self, difference: LayerDifference) -> ErrorCurve:
        """Return the curve of the one shape, or of the LoRA, with no more terms than needed."""
        if not self.one_shape or self.target.to_lora:
            if self.target.to_lora and self.request.terms is not None:
                return difference.curve(lora_shape(difference.size), min(self.request.terms, *difference.size))
            return difference.curve_to_noise(lora_shape(difference.size), self.request.max_error)
        shape = self.shape_of(difference.pair)
        terms = self.request.terms
        return difference.curve(shape, None if terms is None else min(terms, shape.max_terms))

    def shape_of(self, pair: LayerPair) -> KronShape:
        """Return the requested shape. Raises ShapeError, naming the layer, if it does not divide the layer."""
        (a1, a2), size = self.request.shape or (1, 1), pair.size
        try:
            return split(size, a1, a2)
        except ShapeError as e:
            if self.request.fallback:
                return nearest_split(size, a1, a2)
            e.fix += " Or use --shape-fallback nearest, or select layers with --targets."
            raise e.within(pair.name) from None

    def allowed(self, weight: tuple[int, ...]) -> Allowed:
        """Return the predicate of what the target can hold for a weight of that shape."""
        return _allowed(
            self.target.format, weight, self.request.shape is None and storage_of(self.target.format).one_factor
        )

    def choose(self, pair: LayerPair, curves: list[ErrorCurve], noise: float) -> Factorization:
        """Choose the factorization of a layer by its curves. Raises InexpressibleError if the target can hold none."""
        allowed, dense = self.allowed(pair.shape), not self.one_shape
        if self.request.max_error is not None:
            form = within(curves, self.request.max_error, allowed, dense=dense)
            if form is None:
                raise InexpressibleError(
                    f"{pair.name} requires more terms than {self.target.format} supports for a relative error of "
                    f"{self.request.max_error:g}.",
                    fix="Choose --to krona, --shape auto or a larger --max-error.",
                )
            return form
        if dense:
            return above_noise(curves, noise, allowed, self.request.terms)
        most = curves[0].most(allowed)
        if not most:
            raise InexpressibleError(
                f"{pair.name}: {self.target.format} does not support {curves[0].shape} for weight {list(pair.shape)}.",
                fix="Choose another shape, --shape auto or --to krona.",
            )
        if self.request.terms is not None:
            return curves[0].form(min(self.request.terms, most))
        return above_noise(curves, noise, allowed, dense=False)

    def note(self, pair: LayerPair, curve: ErrorCurve, form: Factorization) -> str:
        """Return remarks on the choice for the report."""
        notes = []
        if self.request.shape is not None and form.terms and form.shape[:2] != self.request.shape:
            notes.append(f"{'x'.join(map(str, self.request.shape))} does not divide the layer")
        if self.request.max_error is None and curve.most(self.allowed(pair.shape)) < (
            self.request.terms or curve.above
        ):
            notes.append(f"{curve.above} terms exceed the noise; {self.target.format} supports one")
        return "; ".join(notes)


@cache
def _allowed(target: str, weight: tuple[int, ...], only_loras: bool) -> Allowed:
    @cache
    def loaded(shape: KronShape, terms: int, right_rank: int | None) -> bool:
        return loads_form(target, weight, shape, terms, right_rank)

    def allowed(shape: KronShape, terms: int, right_rank: int | None) -> bool:
        if only_loras and not (shape[:2] == (1, 1) and is_lora(shape, right_rank)):
            return False
        # targets only distinguish one term from several and a dense B from a product
        return loaded(shape, min(terms, 2), None if right_rank is None else 1)

    return allowed
