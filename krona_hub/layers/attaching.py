"""Adapters into the modules of a model in memory, and out again.

A model is a torch module, or a pipeline with several of them. Adapted modules are replaced by KronLayers around them;
what a state_dict shows does not change, and after `detach` every module is the very object that it was before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from krona_hub.adapter import Adapter, LayerDelta
from krona_hub.errors import BaseMismatchError, ConflictError, KronaError, NotFoundError, ShapeError, UnsupportedError
from krona_hub.layers.branch import Branch
from krona_hub.layers.conv import KronConv1d, KronConv2d, KronConv3d
from krona_hub.layers.layer import DEFAULT, KronLayer, check_name, core
from krona_hub.layers.linear import KronLinear
from krona_hub.layers.places import Place, adapted, find, layers_in, models_of, parts_of

KINDS: tuple[tuple[type[nn.Module], Callable[[nn.Module], KronLayer]], ...] = (
    (nn.Conv1d, KronConv1d),
    (nn.Conv2d, KronConv2d),
    (nn.Conv3d, KronConv3d),
    (nn.Module, KronLinear),  # whatever else says how many features it takes and gives
)
NAMED = 3  # modules that a message names


@dataclass(frozen=True)
class AttachReport:
    """What became of an adapter's layers in a model."""

    name: str
    matched: tuple[str, ...]  # canonical layer names
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = len(self.matched) + len(self.missing)
        return "; ".join((f"{self.name}: {len(self.matched)} of {total} modules", *self.notes))


# ── in and out ───────────────────────────────────────────────────────────────────────────────────


def attach(
    model: Any,
    adapter: Adapter,
    name: str = DEFAULT,
    scale: float = 1.0,
    *,
    component: str | None = None,
    allow_missing: bool = False,
    trainable: bool = False,
) -> AttachReport:
    """Let the modules of `model` compute with an adapter: y = base(x) + scale · ΔW x, where ΔW is never formed.

    `model` is a pipeline, or one of its models, which gets the layers of its own component (`component` says which,
    where that is not plain). Adapters under several names add up. With `trainable` the factors are parameters, float32
    at least; what else is trained is up to you. Raises BaseMismatchError where modules are missing ("N of M";
    `allow_missing` attaches the others), ShapeError where one has another size, ConflictError for a name that is
    taken; nothing is attached then.

    >>> from krona_hub.kron.terms import KronTerms
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> adapter = Adapter({"unet.0": LayerDelta((KronTerms(torch.ones(1, 2, 2), torch.ones(1, 2, 2)),), (4, 4))})
    >>> print(attach(model, adapter, "style", scale=0.5))
    style: 1 of 1 modules
    """
    check_name(name)
    if any(name in layer.branches for _, _, layer in adapted(model)):
        raise ConflictError(f"an adapter {name!r} is attached already.", fix="Detach it, or choose another name.")
    parts = parts_of(model, adapter, component)
    whole = bool(models_of(model)) and component is None  # then a component that the pipeline lacks is missing
    wanted = list(adapter.layers) if whole else layers_in(adapter, tuple(parts))
    places = {layer: place for layer in wanted if (place := find(parts, layer)) is not None}
    missing = tuple(layer for layer in wanted if layer not in places)
    _check_found(places, missing, allow_missing)
    _put_all(places, adapter, name, scale, trainable)
    return AttachReport(name, tuple(places), missing, _left_aside(adapter, wanted))


def _check_found(places: Collection[str], missing: Sequence[str], allowed: bool) -> None:
    if places and (allowed or not missing):
        return
    shown = ", ".join(missing[:NAMED]) + (" …" if len(missing) > NAMED else "")
    raise BaseMismatchError(
        f"{len(places)} of {len(places) + len(missing)} modules of the adapter are in the model."
        + (f" Not there: {shown}." if missing else ""),
        fix="Give the model that the adapter was made for; allow_missing=True attaches what fits."
        if places
        else "Give the model that the adapter was made for, with component= if it is one of several.",
    )


def _left_aside(adapter: Adapter, wanted: Collection[str]) -> tuple[str, ...]:
    """What the adapter holds and this model does not use, in words."""
    aside = len(adapter) - len(wanted)
    notes = [f"{aside} layers are for other components"] if aside else []
    if adapter.extras:
        notes.append(f"not used, as they are no weight deltas: {', '.join(list(adapter.extras)[:NAMED])}")
    return tuple(notes)


def _put_all(places: Mapping[str, Place], adapter: Adapter, name: str, scale: float, trainable: bool) -> None:
    done: list[Place] = []
    try:
        for layer, place in places.items():
            _put(place, name, layer, adapter.layers[layer], scale, trainable)
            done.append(place)
    except BaseException as error:
        _take_out(done, name)
        if isinstance(error, KronaError):
            raise error.within(layer) from None
        raise


def _put(place: Place, name: str, layer: str, delta: LayerDelta, scale: float, trainable: bool) -> None:
    module = place.module
    around = module if isinstance(module, KronLayer) else wrapped(module)
    around.add(name, delta, scale=scale, layer=layer, trainable=trainable)
    place.put(around)


def wrapped(module: nn.Module) -> KronLayer:
    """A KronLayer around a module, by what it is inside. Raises UnsupportedError where it has no features."""
    kind = next(layer for base, layer in KINDS if isinstance(core(module), base))
    return kind(module)


def detach(model: Any, name: str | None = None) -> None:
    """Take one adapter out, or all of them; modules without any are the base modules again, the same objects.

    Adapters that are fused are unfused first. Raises NotFoundError for a name that is not attached.
    """
    found = _having(model, name)
    if any(layer.fused for _, layer in found):
        unfuse(model)
    for each in [name] if name is not None else sorted({n for _, layer in found for n in layer.branches}):
        _take_out([place for place, layer in found if each in layer.branches], each)


def _take_out(places: Sequence[Place], name: str) -> None:
    for place in places:
        layer = place.module
        if isinstance(layer, KronLayer):
            layer.remove(name)
            if not len(layer.branches):
                place.put(layer.base)


def _having(model: Any, name: str | None) -> list[tuple[Place, KronLayer]]:
    """The layers with this adapter, or with any."""
    layers = list(adapted(model))
    found = [(place, layer) for _, place, layer in layers if name is None or name in layer.branches]
    if name is not None and not found:
        names = sorted({n for _, _, layer in layers for n in layer.branches})
        raise NotFoundError(
            f"no adapter {name!r} is attached.",
            fix=f"Attached: {', '.join(names)}." if names else "None is; attach or load_into comes first.",
        )
    return found


# ── strengths and numbers ────────────────────────────────────────────────────────────────────────


def attached(model: Any) -> dict[str, float]:
    """Name -> strength of every adapter in a model, in the order of attaching."""
    return {name: branch.scale for _, _, layer in adapted(model) for name, branch in layer.adapters()}


def set_scales(model: Any, scales: Mapping[str, float]) -> None:
    """Set the strength of adapters by name; 0 turns one off. Nothing is compiled again.

    Raises NotFoundError for a name that is not attached, ConflictError where adapters are fused.
    """
    found = {name: _having(model, name) for name in scales}
    for name, layers in found.items():
        for _, layer in layers:
            _refuse_fused(layer)
            layer.branch(name).set_scale(scales[name])


def swap(model: Any, adapter: Adapter, name: str = DEFAULT) -> None:
    """Put the numbers of another adapter of the same layers and sizes where those of `name` are; nothing is recompiled.

    Raises ShapeError, with nothing changed, where it differs in layers, shapes, terms or ranks.
    """
    found = {str(layer.branch(name).layer): layer for _, layer in _having(model, name)}
    differs = sorted(found.keys() ^ adapter.layers.keys())
    both = found.keys() & adapter.layers.keys()
    differs += [n for n in sorted(both) if not found[n].branch(name).fits(adapter.layers[n])]
    if differs:
        raise ShapeError(
            f"the adapter cannot take the place of {name!r}: {len(differs)} layers differ, the first is {differs[0]}.",
            fix="Detach the old one and attach the new one.",
        )
    for path, layer in found.items():
        _refuse_fused(layer)
        layer.branch(name).take(adapter.layers[path], layer.readable_weight)


def extract_adapter(model: Any, name: str = DEFAULT, *, component: str | None = None) -> Adapter:
    """The adapter as it is now, trained or not, at strength 1: what `write` stores.

    `component` names the model where it is a lone one whose layers were made by hand.
    """
    _having(model, name)
    prefix = f"{component}." if component and isinstance(model, nn.Module) else ""
    branches = {prefix + path: layer.branch(name) for path, _, layer in adapted(model) if name in layer.branches}
    return Adapter({branch.layer or path: branch.value for path, branch in branches.items()})


# ── into the weights ─────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def fuse(model: Any) -> None:
    """Add every attached adapter, at its strength, to the base weights: as fast as no adapter, until `unfuse`.

    Computed in float32 at least and rounded once; the old weights wait in main memory. Raises UnsupportedError, with
    nothing changed, where a weight is quantised or packed.
    """
    layers = [(path, layer) for path, _, layer in adapted(model) if not layer.fused]
    packed = [path for path, layer in layers if layer.readable_weight is None]
    if packed:
        raise UnsupportedError(
            f"{len(packed)} of {len(layers)} weights are no plain numbers (quantised, perhaps): {packed[0]}.",
            fix="Keep the adapters attached; they work beside such weights.",
        )
    for _, layer in layers:
        layer.fuse()


def unfuse(model: Any) -> None:
    """Put the base weights back, bit for bit; the adapters compute beside them again."""
    for _, _, layer in adapted(model):
        layer.unfuse()


def _refuse_fused(layer: KronLayer) -> None:
    if layer.fused:
        raise ConflictError("adapters are fused into the weights.", fix="Call unfuse first.")


def branches_of(model: Any, name: str) -> list[Branch]:
    """The parts of an adapter, one per module: their `parameters()` are what an optimiser trains."""
    return [layer.branch(name) for _, layer in _having(model, name)]
