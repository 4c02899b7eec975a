"""Attach adapters to the layers of a model, and remove them: `attach`, `detach`, `swap`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from torch import nn

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.errors import BaseMismatchError, ConflictError, KronaError, ShapeError, UnsupportedError, abbreviated
from krona_hub.layers.attachment import attachments, branch_at, check_scale, layer_parts, vectors_of
from krona_hub.layers.fusing import restore
from krona_hub.layers.kron_conv import KronConv1d, KronConv2d, KronConv3d
from krona_hub.layers.kron_layer import DEFAULT, KronLayer, check_name, core
from krona_hub.layers.kron_linear import KronLinear
from krona_hub.layers.layer_match import Parts, Placing, Problems, placings
from krona_hub.layers.module_tree import Slot, models_of, parts_of, unwrapped
from krona_hub.layers.parameter_vectors import ParameterVectors, add_vectors, remove_vectors, replace_vectors
from krona_hub.layers.vector_match import VectorPlacing, vector_placings

WRAPPERS: tuple[tuple[type[nn.Module], Callable[[nn.Module], KronLayer]], ...] = (
    (nn.Conv1d, KronConv1d),
    (nn.Conv2d, KronConv2d),
    (nn.Conv3d, KronConv3d),
    (nn.Module, KronLinear),  # anything else with in_features and out_features
)


REBUILDING = ("fuse_qkv_projections", "unfuse_qkv_projections")  # methods that copy or restore the base weights alone


@dataclass(frozen=True)
class AttachReport:
    """The layers and vectors of an adapter that are attached to a model, and those that are not."""

    name: str
    matched: tuple[str, ...]  # canonical layers that are adapted
    missing: Mapping[str, str] = field(default_factory=dict)  # canonical layer -> cause
    elsewhere: tuple[str, ...] = ()  # layers of components that were not requested
    extras: tuple[str, ...] = ()  # tensors that change no parameter, such as embeddings; not applied
    notes: tuple[str, ...] = ()  # summary of the two above, and notes of the file reader
    vectors: tuple[str, ...] = ()  # canonical parameters that vectors are added to: biases, weights of norms
    missing_vectors: Mapping[str, str] = field(default_factory=dict)  # canonical parameter -> cause

    def __str__(self) -> str:
        """
        >>> print(AttachReport("toy", ("unet.conv_in",), {"unet.x": "no such layer"}))
        toy: 1 of 2 modules
        >>> print(AttachReport("toy", ("unet.conv_in",), vectors=("unet.conv_in.bias",)))
        toy: 1 of 1 modules and 1 of 1 vectors
        """
        modules = f"{len(self.matched)} of {len(self.matched) + len(self.missing)} modules"
        total = len(self.vectors) + len(self.missing_vectors)
        vectors = f" and {len(self.vectors)} of {total} vectors" if total else ""
        return "; ".join((f"{self.name}: {modules}{vectors}", *self.notes))


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
    """Attach an adapter, so that its layers compute base(x) + scale · ΔW x without changing W, and so for vectors.

    Adapters with different names add up. Compiled models and models with PEFT adapters are supported. All layers and
    vectors are checked before any is changed.

    Parameters
    ----------
    model : diffusers pipeline or model; a lone model gets only the layers of its own component
    adapter : adapter as returned by `krona_hub.read`
    name : name for `set_scales` and `detach` (default: "default")
    scale : strength (default: 1.0)
    component : component of a lone model, if its class is ambiguous; the only component of a pipeline to change
    allow_missing : attach the layers that fit, if any, instead of raising BaseMismatchError
    trainable : make the factors (not the vectors) parameters, of at least float32; freezing the base is up to you

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
    own = _for_parts(adapter, parts) if component or isinstance(model, nn.Module) else adapter
    found, missing = placings(own.layers, parts)
    vectors, missing_vectors = vector_placings(own.vectors, parts)
    _check_free(name, parts)
    _check_matched(own, {**missing, **missing_vectors}, parts, allow_missing)
    _attach_all(found, vectors, name, scale, trainable)
    guard(parts.values())
    return _report(name, adapter, own, missing, missing_vectors)


def _parts(model: Any, adapter: Adapter, component: str | None) -> dict[str, nn.Module]:
    """Like `parts_of`, but a lone model whose class is ambiguous is the component that it fits."""
    wanted: tuple[str, ...] = adapter.components
    if isinstance(model, nn.Module) and component is None and len(wanted) > 1:
        inner = unwrapped(model)
        fits = [c for c in wanted if _fits(_for_parts(adapter, (c,)), {c: inner})]
        wanted = tuple(fits) or wanted
    return parts_of(model, wanted, component)


def _fits(adapter: Adapter, parts: Parts) -> bool:
    return not placings(adapter.layers, parts)[1] and not vector_placings(adapter.vectors, parts)[1]


def _for_parts(adapter: Adapter, components: Collection[str]) -> Adapter:
    """Return the layers and vectors for some components."""
    layers = {name: delta for name, delta in adapter.layers.items() if name.partition(".")[0] in components}
    vectors = {name: vector for name, vector in adapter.vectors.items() if name.partition(".")[0] in components}
    return replace(adapter, layers=layers, vectors=vectors)


def _report(name: str, adapter: Adapter, own: Adapter, missing: Problems, missing_vectors: Problems) -> AttachReport:
    elsewhere = tuple(layer for layer in adapter.layers if layer not in own)
    others = len(adapter.vectors) - len(own.vectors)
    extras = tuple(adapter.extras)
    counts = [f"{len(elsewhere)} layers"] * bool(elsewhere) + [f"{others} vectors"] * bool(others)
    notes = [f"{' and '.join(counts)} are for other components"] if counts else []
    notes += [f"not applied, because they are not weight deltas: {abbreviated(extras)}"] if extras else []
    return AttachReport(
        name,
        tuple(layer for layer in own if layer not in missing),
        {layer: error.cause for layer, error in missing.items()},
        elsewhere,
        extras,
        tuple(notes),
        tuple(vector for vector in own.vectors if vector not in missing_vectors),
        {vector: error.cause for vector, error in missing_vectors.items()},
    )


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
    own = attachments(models)
    if name is not None:
        own.check_known(name)
    restore(own)
    _remove(own.slots.values(), own.vectors, name)
    left = attachments(models)
    if not left.slots and not left.vectors:
        release(models.values())


def swap(model: Any, adapter: Adapter, name: str = DEFAULT, *, component: str | None = None) -> None:
    """Replace an attached adapter by one with the same layers, vectors, shapes and terms; its strength stays.

    The numbers are copied into the existing tensors, so that nothing is recompiled. Raises BaseMismatchError if the
    adapter changes other layers or parameters, ShapeError if a shape or a number of terms differs; nothing is changed
    then.
    """
    parts = _parts(model, adapter, component)
    own = attachments(parts)
    own.check_known(name)
    own.check_not_fused()
    new = _for_parts(adapter, parts)
    _check_same("layers", layer_parts(own.slots, name), new.layers)
    _check_same("vectors", vectors_of(own.vectors, name), new.vectors)
    found, missing = placings(new.layers, parts)
    vectors, missing_vectors = vector_placings(new.vectors, parts)
    _check_matched(new, {**missing, **missing_vectors}, parts, False)
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
    for vector in vectors:
        replace_vectors(vector.module, vector.key, name, vector.shares)


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_free(name: str, parts: Parts) -> None:
    if name in attachments(parts).names:
        raise ConflictError(
            f"An adapter {name!r} is already attached.", fix="Detach it, swap it, or choose another name."
        )


def _check_matched(own: Adapter, missing: Problems, parts: Parts, allow_missing: bool) -> None:
    total = len(own.layers) + len(own.vectors)
    if not total:
        raise BaseMismatchError(
            f"The adapter has no layers for {', '.join(parts)}.",
            fix="See adapter.components for those that it changes.",
        )
    if not missing or (allow_missing and len(missing) < total):
        return
    first, error = next(iter(missing.items()))
    rest = total - len(missing)
    items = "modules and vectors" if own.vectors else "modules"
    raise BaseMismatchError(
        f"{rest} of {total} {items} match; not {abbreviated(missing)}. {first}: {error.cause}",
        fix=f"{error.fix} Or attach the other {rest} with allow_missing=True." if rest else error.fix,
    )


def _check_same(items: str, old: Iterable[str], new: Iterable[str]) -> None:
    other = sorted(set(old) ^ set(new))
    if other:
        raise BaseMismatchError(
            f"The adapters change different {items}: {len(other)} differ, {abbreviated(other)}.",
            fix="Detach the old adapter and attach the new one.",
        )


def _factorization(delta: LayerDelta) -> str:
    return " + ".join(f"{s.terms} of {s.shape}" for s in delta.sums) + (
        " with DoRA" if delta.magnitude is not None else ""
    )


# --- changes of the module tree --------------------------------------------------------------------------------------


def _attach_all(
    found: Iterable[Placing], vectors: Iterable[VectorPlacing], name: str, scale: float, trainable: bool
) -> None:
    """Attach everything, or nothing if an error occurs."""
    slots: list[Slot] = []
    added: list[ParameterVectors] = []
    where = ""
    try:
        for placing in found:
            where = placing.layer
            _attach_one(placing, name, scale, trainable)
            slots.append(placing.slot)
        for vector in vectors:
            where = vector.shares[0].name
            added.append(add_vectors(vector.module, vector.key, name, vector.shares, scale))
    except BaseException as error:
        _remove(slots, added, name)
        if isinstance(error, KronaError):
            raise error.within(where) from None
        raise


def _remove(slots: Iterable[Slot], vectors: Iterable[ParameterVectors], name: str | None) -> None:
    for slot in slots:
        _strip(slot, name)
    for each in vectors:
        remove_vectors(each, name)


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
