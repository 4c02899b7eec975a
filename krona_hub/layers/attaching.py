"""Attach adapters to the layers of a model, and remove them: `attach`, `detach`, `swap`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import nn

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.errors import BaseMismatchError, ConflictError, KronaError, ShapeError, UnsupportedError, abbreviated
from krona_hub.layers.attachment import branch_at, check_not_fused, check_scale, layer_parts, names_of, unknown_name
from krona_hub.layers.fusing import restore
from krona_hub.layers.kron_conv import KronConv1d, KronConv2d, KronConv3d
from krona_hub.layers.kron_layer import DEFAULT, KronLayer, check_name, core
from krona_hub.layers.kron_linear import KronLinear
from krona_hub.layers.layer_match import Deltas, Parts, Placing, Problems, placings
from krona_hub.layers.module_tree import Slot, kron_layers, models_of, parts_of, unwrapped

WRAPPERS: tuple[tuple[type[nn.Module], Callable[[nn.Module], KronLayer]], ...] = (
    (nn.Conv1d, KronConv1d),
    (nn.Conv2d, KronConv2d),
    (nn.Conv3d, KronConv3d),
    (nn.Module, KronLinear),  # anything else with in_features and out_features
)


REBUILDING = ("fuse_qkv_projections", "unfuse_qkv_projections")  # methods that copy or restore the base weights alone


@dataclass(frozen=True)
class AttachReport:
    """The layers of an adapter that are attached to a model, and those that are not."""

    name: str
    matched: tuple[str, ...]  # canonical layers that are adapted
    missing: Mapping[str, str] = field(default_factory=dict)  # canonical layer -> cause
    elsewhere: tuple[str, ...] = ()  # layers of components that were not requested
    extras: tuple[str, ...] = ()  # tensors other than weight deltas, such as embeddings; not applied
    notes: tuple[str, ...] = ()  # summary of the two above, and notes of the file reader

    def __str__(self) -> str:
        """
        >>> print(AttachReport("toy", ("unet.conv_in",), {"unet.x": "no such layer"}))
        toy: 1 of 2 modules
        """
        total = len(self.matched) + len(self.missing)
        return "; ".join((f"{self.name}: {len(self.matched)} of {total} modules", *self.notes))


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
    """Attach an adapter, so that its layers compute base(x) + scale · ΔW x without changing W.

    Adapters with different names add up. Compiled models and models with PEFT adapters are supported. All layers are
    checked before any is changed.

    Parameters
    ----------
    model : diffusers pipeline or model; a lone model gets only the layers of its own component
    adapter : adapter as returned by `krona_hub.read`
    name : name for `set_scales` and `detach` (default: "default")
    scale : strength (default: 1.0)
    component : component of a lone model, if its class is ambiguous; the only component of a pipeline to change
    allow_missing : attach the layers that fit, if any, instead of raising BaseMismatchError
    trainable : make the factors parameters, of at least float32; freezing the base is up to you

    Returns
    -------
    AttachReport
        Adapted layers, and missing ones with their causes.

    Raises
    ------
    BaseMismatchError
        Some layers do not fit the model ("N of M modules match").
    ConflictError
        The name is taken, or adapters are fused.

    Examples
    --------
    >>> import torch
    >>> from krona_hub.kron.terms import KronTerms
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> delta = LayerDelta((KronTerms(torch.ones(1, 2, 2), torch.ones(1, 1, 2)),), (2, 4))
    >>> print(attach(model, Adapter({"unet.0": delta}), "toy", scale=0.5))
    toy: 1 of 1 modules
    """
    check_name(name)
    check_scale(scale)
    parts = _parts(model, adapter, component)
    own = {layer: d for layer, d in adapter.layers.items() if not component or layer.startswith(f"{component}.")}
    if isinstance(model, nn.Module):
        own = {layer: d for layer, d in own.items() if layer.partition(".")[0] in parts}
    found, missing = placings(own, parts)
    _check_free(name, parts)
    _check_matched(own, missing, parts, allow_missing)
    _attach_all(found, name, scale, trainable)
    guard(parts.values())
    return _report(name, adapter, own, missing)


def _parts(model: Any, adapter: Adapter, component: str | None) -> dict[str, nn.Module]:
    """Like `parts_of`, but a lone model whose class is ambiguous is the component that it fits."""
    wanted: tuple[str, ...] = adapter.components
    if isinstance(model, nn.Module) and component is None and len(wanted) > 1:
        inner = unwrapped(model)
        fits = [c for c in wanted if not placings(_of_component(adapter, c), {c: inner})[1]]
        wanted = tuple(fits) or wanted
    return parts_of(model, wanted, component)


def _of_component(adapter: Adapter, component: str) -> Deltas:
    return {layer: d for layer, d in adapter.layers.items() if layer.startswith(f"{component}.")}


def _report(name: str, adapter: Adapter, own: Deltas, missing: Problems) -> AttachReport:
    matched = tuple(layer for layer in own if layer not in missing)
    elsewhere = tuple(layer for layer in adapter.layers if layer not in own)
    extras = tuple(adapter.extras)
    notes = [f"{len(elsewhere)} layers are for other components"] if elsewhere else []
    notes += [f"not applied, because they are not weight deltas: {abbreviated(extras)}"] if extras else []
    causes = {layer: error.cause for layer, error in missing.items()}
    return AttachReport(name, matched, causes, elsewhere, extras, tuple(notes))


def detach(model: Any, name: str | None = None, *, component: str | None = None) -> None:
    """Remove one adapter, or all attached ones, and restore the original modules of the model.

    Fused adapters, all of them, are first removed from the weights.

    Parameters
    ----------
    model : diffusers pipeline or model
    name : adapter to remove; None (default) removes all, except layers that you constructed yourself
    component : component of a lone model, or the only component of a pipeline to change

    Raises
    ------
    NotFoundError
        No adapter of this name is attached.

    Examples
    --------
    >>> import torch
    >>> from krona_hub.kron.terms import KronTerms
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> delta = LayerDelta((KronTerms(torch.ones(1, 2, 2), torch.ones(1, 1, 2)),), (2, 4))
    >>> _ = attach(model, Adapter({"unet.0": delta}), "toy")
    >>> detach(model, "toy")
    >>> type(model[0]).__name__
    'Linear'
    """
    models = models_of(model, component)
    slots = kron_layers(models).values()
    if name is not None and name not in names_of(slots):
        raise unknown_name(name, slots)
    restore(slots)
    for slot in slots:
        _strip(slot, name)
    if not kron_layers(models):
        release(models.values())


def swap(model: Any, adapter: Adapter, name: str = DEFAULT, *, component: str | None = None) -> None:
    """Replace an attached adapter by one with the same layers, shapes and terms; its strength stays.

    The factors are copied into the existing tensors, so that nothing is recompiled. Raises BaseMismatchError if the
    adapter changes other layers, ShapeError if a shape or a number of terms differs; then nothing is changed.
    """
    parts = _parts(model, adapter, component)
    slots = kron_layers(parts)
    check_not_fused(slots.values())
    new = {layer: d for layer, d in adapter.layers.items() if layer.partition(".")[0] in parts}
    _check_same_layers(layer_parts(slots, name), new)
    found, missing = placings(new, parts)
    _check_matched(new, missing, parts, False)
    branches = [branch_at(placing.slot, name) for placing in found]
    for placing, (_, branch) in zip(found, branches, strict=True):
        if not branch.fits(placing.delta):
            raise ShapeError(
                f"{placing.layer}: the new factors differ in size ({_factorization(placing.delta)}, not "
                f"{_factorization(branch.value)}).",
                fix="Detach the old adapter and attach the new one.",
            )
    for placing, (layer, branch) in zip(found, branches, strict=True):
        branch.take(placing.delta, layer.readable_weight)


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_free(name: str, parts: Parts) -> None:
    if name in names_of(kron_layers(parts).values()):
        raise ConflictError(
            f"An adapter {name!r} is already attached.", fix="Detach it, swap it, or choose another name."
        )


def _check_matched(deltas: Deltas, missing: Problems, parts: Parts, allow_missing: bool) -> None:
    if not deltas:
        raise BaseMismatchError(
            f"The adapter has no layers for {', '.join(parts)}.",
            fix="See adapter.components for those that it changes.",
        )
    if not missing or (allow_missing and len(missing) < len(deltas)):
        return
    first, error = next(iter(missing.items()))
    rest = len(deltas) - len(missing)
    raise BaseMismatchError(
        f"{rest} of {len(deltas)} modules match; not {abbreviated(missing)}. {first}: {error.cause}",
        fix=f"{error.fix} Or attach the other {rest} with allow_missing=True." if rest else error.fix,
    )


def _check_same_layers(old: Iterable[str], new: Iterable[str]) -> None:
    other = sorted(set(old) ^ set(new))
    if other:
        raise BaseMismatchError(
            f"The adapters change different layers: {len(other)} differ, {abbreviated(other)}.",
            fix="Detach the old adapter and attach the new one.",
        )


def _factorization(delta: LayerDelta) -> str:
    return " + ".join(f"{s.terms} of {s.shape}" for s in delta.sums) + (
        " with DoRA" if delta.magnitude is not None else ""
    )


# --- changes of the module tree --------------------------------------------------------------------------------------


def _attach_all(found: Iterable[Placing], name: str, scale: float, trainable: bool) -> None:
    """Attach everything, or nothing if an error occurs."""
    done: list[Slot] = []
    try:
        for placing in found:
            _attach_one(placing, name, scale, trainable)
            done.append(placing.slot)
    except BaseException as error:
        for slot in done:
            _strip(slot, name)
        if isinstance(error, KronaError):
            raise error.within(placing.layer) from None
        raise


def _attach_one(placing: Placing, name: str, scale: float, trainable: bool) -> None:
    slot, module = placing.slot, placing.slot.module
    if trainable and placing.parts:  # gradients would reach the rows of the other layers
        raise UnsupportedError(
            "Factors in a fused projection cannot be trained.", fix="Call unfuse_qkv_projections() first."
        )
    layer = module if isinstance(module, KronLayer) else _wrapper(module)
    layer.add(name, placing.delta, scale=scale, layer=placing.layer, trainable=trainable)
    layer.branch(name).parts = placing.parts
    if layer is not module:
        setattr(slot.parent, slot.key, layer)


def _wrapper(module: nn.Module) -> KronLayer:
    inner = core(unwrapped(module))
    layer = next(wrap for kind, wrap in WRAPPERS if isinstance(inner, kind))(module)
    layer.placed = True
    return layer


def _strip(slot: Slot, name: str | None) -> None:
    """Remove the adapter of that name, or all attached ones; remove the layer if none is left."""
    layer = slot.module
    if not isinstance(layer, KronLayer):
        return
    for key, branch in list(layer.adapters()):
        if key == name or (name is None and not branch.stored):
            layer.remove(key)
    if layer.placed and not len(layer.branches):
        setattr(slot.parent, slot.key, layer.base)


def refuse(*_: Any, **__: Any) -> NoReturn:
    """Replace methods after which a model would silently compute without its adapters."""
    raise ConflictError(
        "Adapters are attached to the projections that this call would replace.",
        fix="Detach (or unload) them first, and load them again afterwards; fused projections are supported.",
    )


def guard(models: Iterable[nn.Module]) -> None:
    """Shadow the methods of the class with `refuse`, on these models only."""
    for model in models:
        vars(model).update({name: refuse for name in REBUILDING if hasattr(type(model), name)})


def release(models: Iterable[nn.Module]) -> None:
    """Restore the methods of the class."""
    for model in models:
        for name in REBUILDING:
            if vars(model).get(name) is refuse:
                del vars(model)[name]
