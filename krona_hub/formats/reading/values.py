"""Read the vectors of a file, and parameters that it stores whole rather than as differences (FORMATS §18)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.bases.loading import Weights
from krona_hub.bases.module_spec import Placement
from krona_hub.errors import BaseMismatchError, KronaError, NonFiniteError, UnknownBaseError
from krona_hub.formats.parsing.vector_match import VectorTarget
from krona_hub.formats.reading.decode import is_finite
from krona_hub.formats.reading.read_plan import ReadPlan, VectorPlan
from krona_hub.kron.terms import KronTerms, dense_factor, wide

Piece = tuple[VectorTarget, Tensor]  # a parameter, and the change of its rows


def vectors_of(plan: ReadPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameter -> what is added to it at strength 1; `tensors` are those of the file, by key.

    Vectors keep their stored dtype; scaled ones, and differences of whole parameters, are at least float32. Raises
    NonFiniteError, UnknownBaseError if a whole parameter has no base weight.
    """
    found: dict[str, list[Piece]] = {}
    for vector in plan.vectors:
        try:
            for target, values in _pieces(vector, tensors[vector.key.key], plan.file.weights):
                found.setdefault(target.parameter, []).append((target, values))
        except KronaError as error:
            raise error.within(vector.key.key) from None
    return {parameter: _joined(pieces) for parameter, pieces in found.items()}


def _joined(pieces: Sequence[Piece]) -> Tensor:
    """The change of a parameter from those of its rows; rows without one do not change."""
    target, values = pieces[-1]
    if target.placement.part is None:
        return values
    dtype = values.dtype
    for _, other in pieces:
        dtype = torch.promote_types(dtype, other.dtype)
    whole = values.new_zeros(target.shape, dtype=dtype)
    for own, rows in pieces:
        start, stop = own.placement.part or (0, len(whole))
        whole[start:stop] = rows
    return whole


def _pieces(vector: VectorPlan, stored: Tensor, weights: Weights | None) -> Iterator[Piece]:
    if not is_finite(stored):
        raise NonFiniteError("The vector contains NaN or infinity.", fix="Use an earlier checkpoint.")
    whole = stored if vector.scale == 1 else wide(stored) * vector.scale
    for target in vector.targets:
        rows = target.placement.part
        shape = (rows[1] - rows[0], *target.shape[1:]) if rows else target.shape
        values = _part(whole, target.placement).reshape(shape)
        if vector.key.is_value:
            values = wide(values) - wide(base_value(target.parameter, values, weights, rows))
        yield target, values


def _part(whole: Tensor, place: Placement) -> Tensor:
    """The rows of a stored vector that belong to one parameter, with halves in canonical order."""
    part = whole if place.rows is None else whole.flatten()[place.rows[0] : place.rows[1]]
    return torch.cat(part.flatten().chunk(2)[::-1]) if place.swap_halves else part


def minus_base(place: Placement, delta: LayerDelta, weights: Weights | None) -> LayerDelta:
    """Return W′ − W for a delta that holds W′: a dense matrix in float32 at least."""
    value = dense_factor(delta.sums[0].right)[0].reshape(delta.weight_shape)
    change = wide(value) - wide(base_value(place.layer, value, weights, place.part))
    return replace(delta, sums=(KronTerms(torch.ones(1, 1, 1), change.flatten(1)[None]),))


def base_value(name: str, like: Tensor, weights: Weights | None, rows: tuple[int, int] | None = None) -> Tensor:
    """Return the weight of a layer or another parameter of the base model, or rows of it, in the shape of `like`.

    Raises UnknownBaseError without base weights, BaseMismatchError for another size.
    """
    found = weights(name) if weights else None
    if found is None:
        raise UnknownBaseError(
            "The file stores the whole parameter: its difference depends on the base weights.",
            fix="Specify a base model with weights, with --base (a folder or a checkpoint file).",
        )
    if rows:
        found = found[rows[0] : rows[1]]
    if found.numel() != like.numel():
        raise BaseMismatchError(
            f"The parameter is {tuple(like.shape)}, but that of the base model is {tuple(found.shape)}.",
            fix="Specify the base model the adapter was trained on with --base.",
        )
    return found.reshape(like.shape).to(like.device)
