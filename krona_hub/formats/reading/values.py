"""Read the vectors of a file, and parameters that it stores whole rather than as differences (FORMATS §18)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.bases.loading import Weights
from krona_hub.bases.module_spec import Placement
from krona_hub.errors import BaseMismatchError, KronaError, NonFiniteError, UnknownBaseError
from krona_hub.formats.reading.decode import is_finite
from krona_hub.formats.reading.read_plan import ReadPlan, VectorPlan
from krona_hub.kron.terms import KronTerms, dense_factor, wide


def vectors_of(plan: ReadPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameter -> what is added to it at strength 1; `tensors` are those of the file, by key.

    Vectors keep their stored dtype; scaled ones, and differences of whole parameters, are at least float32. Raises
    NonFiniteError, UnknownBaseError if a whole parameter has no base weight.
    """
    found: dict[str, Tensor] = {}
    for vector in plan.vectors:
        try:
            found |= _parts(vector, tensors[vector.key.key], plan.file.weights)
        except KronaError as error:
            raise error.within(vector.key.key) from None
    return found


def _parts(vector: VectorPlan, stored: Tensor, weights: Weights | None) -> dict[str, Tensor]:
    if not is_finite(stored):
        raise NonFiniteError("The vector contains NaN or infinity.", fix="Use an earlier checkpoint.")
    whole = stored if vector.scale == 1 else wide(stored) * vector.scale
    parts = {t.parameter: _part(whole, t.placement).reshape(t.shape) for t in vector.targets}
    if not vector.key.is_value:
        return parts
    return {name: wide(part) - wide(base_value(name, part, weights)) for name, part in parts.items()}


def _part(whole: Tensor, place: Placement) -> Tensor:
    """The rows of a stored vector that belong to one parameter, with halves in canonical order."""
    part = whole if place.rows is None else whole.flatten()[place.rows[0] : place.rows[1]]
    return torch.cat(part.flatten().chunk(2)[::-1]) if place.swap_halves else part


def minus_base(layer: str, delta: LayerDelta, weights: Weights | None) -> LayerDelta:
    """Return W′ − W for a delta that holds W′: a dense matrix in float32 at least."""
    value = dense_factor(delta.sums[0].right)[0].reshape(delta.weight_shape)
    change = wide(value) - wide(base_value(layer, value, weights))
    return replace(delta, sums=(KronTerms(torch.ones(1, 1, 1), change.flatten(1)[None]),))


def base_value(name: str, like: Tensor, weights: Weights | None) -> Tensor:
    """Return the weight of a layer or another parameter of the base model, in the shape of `like`.

    Raises UnknownBaseError without base weights, BaseMismatchError for another size.
    """
    found = weights(name) if weights else None
    if found is None:
        raise UnknownBaseError(
            "The file stores the whole parameter: its difference depends on the base weights.",
            fix="Specify a base model with weights, with --base (a folder or a checkpoint file).",
        )
    if found.numel() != like.numel():
        raise BaseMismatchError(
            f"The parameter is {tuple(like.shape)}, but that of the base model is {tuple(found.shape)}.",
            fix="Specify the base model the adapter was trained on with --base.",
        )
    return found.reshape(like.shape).to(like.device)
