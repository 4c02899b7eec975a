"""What is attached to a model: strengths, and the adapter as it is now. `set_scales`, `extract_adapter`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from math import isfinite
from typing import Any, NamedTuple

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.errors import AmbiguousError, ConflictError, NotFoundError, UsageError
from krona_hub.kron.rows import take_rows
from krona_hub.layers.adapter_branch import Branch
from krona_hub.layers.kron_layer import DEFAULT, KronLayer
from krona_hub.layers.module_tree import UNKNOWN, Range, Slot, kron_layers, models_of


class Held(NamedTuple):
    """A layer of an attached adapter."""

    branch: Branch
    sums: slice  # those of the branch that are this layer's
    rows: Range | None


def set_scales(model: Any, scales: Mapping[str, float], *, component: str | None = None) -> None:
    """Set the strengths of attached adapters by name; those not named keep theirs, and 0 costs nothing.

    Nothing is compiled again. Raises NotFoundError for a name that is not attached, ConflictError while adapters are
    fused; nothing is changed then.
    """
    slots = kron_layers(models_of(model, component)).values()
    for name, scale in scales.items():
        check_scale(scale)
        if name not in names_of(slots):
            raise unknown_name(name, slots)
    check_not_fused(slots)
    for layer in layers_of(slots):
        for name, branch in layer.adapters():
            if name in scales:
                branch.set_scale(scales[name])


@contextmanager
def without(branches: Sequence[Branch]) -> Iterator[None]:
    """The model as if these were not attached, while the block runs."""
    before = [branch.scale for branch in branches]
    for branch in branches:
        branch.set_scale(0.0)
    try:
        yield
    finally:
        for branch, scale in zip(branches, before, strict=True):
            branch.set_scale(scale)


def extract_adapter(model: Any, name: str = DEFAULT, *, component: str | None = None) -> Adapter:
    """The attached adapter as a value: what a file said, or copies of the factors as they are trained by now.

    Its numbers are those at strength 1, whatever the scale is. `component` says what a lone model is, where layers
    that you made yourself are in it (attached ones know). Raises NotFoundError where no adapter has this name.
    """
    found = held(kron_layers(models_of(model, component)), name)
    return Adapter({layer: _delta(part) for layer, part in found.items()})


def attached(model: Any) -> dict[str, float]:
    """Name -> scale of the adapters of a model or pipeline, by name."""
    layers = layers_of(kron_layers(models_of(model)).values())
    return dict(sorted((name, branch.scale) for layer in layers for name, branch in layer.adapters()))


def branches_of(model: Any, name: str = DEFAULT) -> list[Branch]:
    """The parts of an adapter, one per module: their `parameters()` are what an optimiser trains."""
    slots = kron_layers(models_of(model)).values()
    found = [layer.branch(name) for layer in layers_of(slots) if name in layer.branches]
    if not found:
        raise unknown_name(name, slots)
    return found


# --- for the other modules of this ring ------------------------------------------------------------------------------


def check_scale(scale: float) -> None:
    if not isfinite(scale):
        raise UsageError(f"{scale} is no strength.", fix="Give a finite number, such as 0.8.")


def check_not_fused(slots: Iterable[Slot]) -> None:
    if any(layer.fused for layer in layers_of(slots)):
        raise ConflictError("adapters are fused into the weights.", fix="Call unfuse first.")


def layers_of(slots: Iterable[Slot]) -> Iterator[KronLayer]:
    yield from (slot.module for slot in slots if isinstance(slot.module, KronLayer))


def names_of(slots: Iterable[Slot]) -> list[str]:
    """The names of all adapters, sorted."""
    return sorted({name for layer in layers_of(slots) for name, _ in layer.adapters()})


def unknown_name(name: str, slots: Iterable[Slot]) -> NotFoundError:
    names = names_of(slots)
    near = get_close_matches(name, names, n=1)
    fix = f"Did you mean {near[0]!r}?" if near else f"Attached: {', '.join(names)}." if names else "None is."
    return NotFoundError(f"no adapter {name!r} is attached.", fix=fix)


def held(slots: Mapping[str, Slot], name: str) -> dict[str, Held]:
    """Canonical layer -> where it is held, of the adapter of that name. Raises NotFoundError where there is none."""
    found: dict[str, Held] = {}
    for path, slot in slots.items():
        layer = slot.module
        if isinstance(layer, KronLayer) and name in layer.branches:
            found |= _parts(path, layer.branch(name))
    if not found:
        raise unknown_name(name, slots.values())
    return found


def branch_at(slot: Slot, name: str) -> tuple[KronLayer, Branch]:
    """The layer and the branch in a slot. Raises NotFoundError where no such adapter is there."""
    layer = slot.module
    if not isinstance(layer, KronLayer):
        raise unknown_name(name, [slot])
    return layer, layer.branch(name)


def _parts(path: str, branch: Branch) -> dict[str, Held]:
    if not branch.parts:
        return {branch.layer or _named(path): Held(branch, slice(None), None)}
    found, first = {}, 0
    for part in branch.parts:
        found[part.layer] = Held(branch, slice(first, first + part.sums), part.rows)
        first += part.sums
    return found


def _named(path: str) -> str:
    if path.startswith(f"{UNKNOWN}."):
        raise AmbiguousError(f"{path} may belong to any component.", fix="Say which with component=.")
    return path


def _delta(part: Held) -> LayerDelta:
    value = part.branch.value
    if part.rows is None:
        return value
    sums = tuple(take_rows(s, [part.rows]) for s in value.sums[part.sums])
    return LayerDelta(sums, (part.rows[1] - part.rows[0], *value.weight_shape[1:]))
