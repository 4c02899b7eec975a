"""Match the vectors of an adapter to the parameters of a model, with a cause for every vector that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from krona_hub.errors import BaseMismatchError, KronaError, ShapeError, UnsupportedError
from krona_hub.layers.layer_match import MODEL, NO_LAYER, Parts, Problems, check_component
from krona_hub.layers.module_tree import Owner, owners_of
from krona_hub.layers.parameter_vectors import VectorShare

Vectors = Mapping[str, Tensor]  # by canonical parameter name


class VectorPlacing(NamedTuple):
    """What one parameter gets: its vector, or those of the several parameters that diffusers fused into it."""

    module: nn.Module
    key: str
    shares: tuple[VectorShare, ...]


def vector_placings(vectors: Vectors, parts: Parts) -> tuple[list[VectorPlacing], Problems]:
    """Return the parameter for each vector, in order, and the vectors that do not fit."""
    if not vectors:
        return [], {}
    owners = owners_of(parts)
    found: dict[tuple[int, str], VectorPlacing] = {}
    problems: Problems = {}
    for name, vector in vectors.items():
        key = name.rpartition(".")[2]
        try:
            owner = _owner(name, vector, owners, parts)
        except KronaError as error:
            problems[name] = error
            continue
        before = found.get((id(owner.module), key))
        shares = (*(before.shares if before else ()), VectorShare(name, vector, owner.rows))
        found[id(owner.module), key] = VectorPlacing(owner.module, key, shares)
    return list(found.values()), problems


def _owner(name: str, vector: Tensor, owners: Mapping[str, Owner], parts: Parts) -> Owner:
    """Return the module of a parameter. Raises a KronaError if the vector cannot be added to it."""
    check_component(name, parts)
    path, _, key = name.rpartition(".")
    owner = owners.get(path)
    if owner is None:
        raise BaseMismatchError(NO_LAYER, fix=MODEL)
    parameter = owner.module._parameters.get(key)
    if parameter is None:
        raise BaseMismatchError(f"The layer has no parameter {key!r} to add a vector to.", fix=MODEL)
    if not parameter.is_floating_point():
        raise UnsupportedError(
            f"The parameter is quantized to {parameter.dtype}, and nothing can be added to it.",
            fix="Load the model in fp32, fp16 or bf16.",
        )
    shape = tuple(parameter.shape)
    if owner.rows is not None:
        shape = (owner.rows[1] - owner.rows[0], *shape[1:])
    if tuple(vector.shape) != shape:
        raise ShapeError(
            f"The adapter adds a vector of shape {tuple(vector.shape)}, but the parameter has {shape}.", fix=MODEL
        )
    return owner
