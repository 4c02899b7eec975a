"""Attached adapters: their strengths and their current factors. `set_scales`, `extract_adapter`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from typing import Any, NamedTuple

from torch import Tensor, nn

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.errors import AmbiguousError, ConflictError, NotFoundError, UsageError
from krona_hub.kron.rows import take_rows
from krona_hub.layers.adapter_branch import Branch
from krona_hub.layers.kron_layer import DEFAULT, KronLayer
from krona_hub.layers.module_tree import UNKNOWN, Range, Slot, kron_layers, models_of
from krona_hub.layers.parameter_vectors import ParameterVectors, VectorBranch, vectors_in


@dataclass(frozen=True)
class Attachments:
    """The adapted layers of models, and their parameters with vectors."""

    slots: Mapping[str, Slot]  # path -> KronLayer
    vectors: tuple[ParameterVectors, ...]

    @property
    def layers(self) -> Iterator[KronLayer]:
        yield from (slot.module for slot in self.slots.values() if isinstance(slot.module, KronLayer))

    @property
    def branches(self) -> Iterator[tuple[str, Branch | VectorBranch]]:
        """Yield (adapter, branch) of every layer and parameter."""
        for layer in self.layers:
            yield from layer.adapters()
        for vectors in self.vectors:
            yield from vectors.branches.items()

    @property
    def names(self) -> list[str]:
        """The names of all adapters, sorted."""
        return sorted({name for name, _ in self.branches})

    @property
    def is_fused(self) -> bool:
        return any(layer.fused for layer in self.layers) or any(vectors.fused for vectors in self.vectors)

    def check_known(self, name: str) -> None:
        """Raise NotFoundError, with the nearest name, if no adapter of that name is attached."""
        names = self.names
        if name in names:
            return
        near = get_close_matches(name, names, n=1)
        fix = (
            f"Did you mean {near[0]!r}?"
            if near
            else f"Attached: {', '.join(names)}."
            if names
            else "No adapter is attached."
        )
        raise NotFoundError(f"No adapter {name!r} is attached.", fix=fix)

    def check_not_fused(self) -> None:
        if self.is_fused:
            raise ConflictError("Adapters are fused into the weights.", fix="Call unfuse first.")


def attachments(models: Mapping[str, nn.Module]) -> Attachments:
    """Return what is attached to these models."""
    return Attachments(kron_layers(models), tuple(vectors_in(models.values())))


class LayerPart(NamedTuple):
    """The part of a branch that belongs to one layer of an attached adapter."""

    branch: Branch
    sums: slice  # sums of the branch that belong to this layer
    rows: Range | None


def set_scales(model: Any, scales: Mapping[str, float], *, component: str | None = None) -> None:
    """Set the strengths of attached adapters by name, without recompiling anything.

    Parameters
    ----------
    model : diffusers pipeline or model
    scales : adapter name -> strength; other adapters keep theirs, and strength 0 costs nothing
    component : component of a lone model, or the only component of a pipeline to change

    Raises
    ------
    NotFoundError, UsageError
        A name is not attached; a strength is NaN or infinite. Nothing is changed then.
    ConflictError
        Adapters are fused.

    Examples
    --------
    >>> from torch import nn
    >>> from krona_hub.layers import KronLinear
    >>> model = nn.Sequential(KronLinear(nn.Linear(4, 2), shape=(2, 2), name="toy"))
    >>> set_scales(model, {"toy": 0.5})
    >>> attached(model)
    {'toy': 0.5}
    """
    own = attachments(models_of(model, component))
    for name, scale in scales.items():
        check_scale(scale)
        own.check_known(name)
    own.check_not_fused()
    for name, branch in own.branches:
        if name in scales:
            branch.set_scale(scales[name])


@contextmanager
def without(branches: Sequence[Branch | VectorBranch]) -> Iterator[None]:
    """Disable these branches while the block runs."""
    before = [branch.scale for branch in branches]
    for branch in branches:
        branch.set_scale(0.0)
    try:
        yield
    finally:
        for branch, scale in zip(branches, before, strict=True):
            branch.set_scale(scale)


def extract_adapter(model: Any, name: str = DEFAULT, *, component: str | None = None) -> Adapter:
    """Return an attached adapter at strength 1, ready for `krona_hub.write`.

    Parameters
    ----------
    model : diffusers pipeline or model
    name : name of the adapter (default: "default")
    component : component of a lone model with layers that you constructed yourself; attached layers know theirs

    Returns
    -------
    Adapter
        The factors as read from the file, or copies of the factors as trained so far.

    Raises
    ------
    NotFoundError
        No adapter of this name is attached.

    Examples
    --------
    >>> from torch import nn
    >>> from krona_hub.layers import KronLinear
    >>> model = nn.Sequential(KronLinear(nn.Linear(4, 2), shape=(2, 2)))
    >>> list(extract_adapter(model, component="unet").layers)
    ['unet.0']
    """
    own = attachments(models_of(model, component))
    own.check_known(name)
    layers = {layer: _delta(part) for layer, part in layer_parts(own.slots, name).items()}
    return Adapter(layers, vectors=vectors_of(own.vectors, name))


def attached(model: Any) -> dict[str, float]:
    """Return name -> strength of the adapters attached to a model or pipeline, sorted by name."""
    return dict(sorted((name, branch.scale) for name, branch in attachments(models_of(model)).branches))


def branches_of(model: Any, name: str = DEFAULT) -> list[Branch]:
    """Return the branches of an adapter, one per module; their `parameters()` are those to train."""
    own = attachments(models_of(model))
    own.check_known(name)
    return [layer.branch(name) for layer in own.layers if name in layer.branches]


def vector_branches_of(model: Any, name: str = DEFAULT) -> list[VectorBranch]:
    """Return the vectors of an adapter, one branch per parameter, or none; they are not trained."""
    return [v.branches[name] for v in vectors_in(models_of(model).values()) if name in v.branches]


# --- for the other modules of this package ---------------------------------------------------------------------------


def check_scale(scale: float) -> None:
    if not isfinite(scale):
        raise UsageError(f"Invalid strength {scale}.", fix="Use a finite number, such as 0.8.")


def layer_parts(slots: Mapping[str, Slot], name: str) -> dict[str, LayerPart]:
    """Return canonical layer -> part of the adapter of that name."""
    found: dict[str, LayerPart] = {}
    for path, slot in slots.items():
        layer = slot.module
        if isinstance(layer, KronLayer) and name in layer.branches:
            found |= _parts(path, layer.branch(name))
    return found


def vectors_of(vectors: Iterable[ParameterVectors], name: str) -> dict[str, Tensor]:
    """Return canonical parameter -> vector of the adapter of that name."""
    return {share.name: share.vector for v in vectors if name in v.branches for share in v.branches[name].shares}


def branch_at(slot: Slot, name: str) -> tuple[KronLayer, Branch]:
    """Return the layer and the branch in a slot. Raises NotFoundError if the adapter is not attached there."""
    layer = slot.module
    if not isinstance(layer, KronLayer):
        raise NotFoundError(f"No adapter {name!r} is attached.", fix="Attach it first.")
    return layer, layer.branch(name)


def _parts(path: str, branch: Branch) -> dict[str, LayerPart]:
    if not branch.parts:
        return {branch.layer or _check_named(path): LayerPart(branch, slice(None), None)}
    found, first = {}, 0
    for part in branch.parts:
        found[part.layer] = LayerPart(branch, slice(first, first + part.sums), part.rows)
        first += part.sums
    return found


def _check_named(path: str) -> str:
    if path.startswith(f"{UNKNOWN}."):
        raise AmbiguousError(f"{path} may belong to any component.", fix="Specify it with component=.")
    return path


def _delta(part: LayerPart) -> LayerDelta:
    value = part.branch.value
    if part.rows is None:
        return value
    sums = tuple(take_rows(s, [part.rows]) for s in value.sums[part.sums])
    return LayerDelta(sums, (part.rows[1] - part.rows[0], *value.weight_shape[1:]))
