"""Adapters around the layers of a model, and away again: `attach`, `detach`, `swap`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import nn

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.errors import BaseMismatchError, ConflictError, KronaError, ShapeError, UnsupportedError, abbreviated
from krona_hub.layers.attachment import branch_at, check_not_fused, check_scale, held, names_of, unknown_name
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
    (nn.Module, KronLinear),  # whatever else says how many features it takes and gives
)


REBUILDING = ("fuse_qkv_projections", "unfuse_qkv_projections")  # methods that copy, or go back to, base weights alone


@dataclass(frozen=True)
class AttachReport:
    """What an adapter changes in a model now, and what of it does not."""

    name: str
    matched: tuple[str, ...]  # canonical layers that are adapted
    missing: Mapping[str, str] = field(default_factory=dict)  # canonical layer -> why it is not
    elsewhere: tuple[str, ...] = ()  # layers of components that were not asked for
    extras: tuple[str, ...] = ()  # tensors that are no deltas, such as embeddings: nothing applies them
    notes: tuple[str, ...] = ()  # in words: the two above, and what the reader of the file has to say

    def __str__(self) -> str:
        """
        >>> print(AttachReport("toy", ("unet.conv_in",), {"unet.x": "there is no such layer"}))
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
    """Let a model compute base(x) + scale · ΔW x wherever the adapter changes it; W is not touched.

    `model` is a diffusers pipeline or a model; of an adapter for several components, a lone model gets the layers of
    its own (`component` says which, where its class does not). Adapters under several names add up. Models that are
    compiled, or that carry PEFT adapters, are looked into. With `trainable` the factors become parameters, float32 at
    least; what else is trained is up to you. `detach` takes everything away again. All layers are checked before any
    is changed: raises BaseMismatchError where some do not fit ("N of M"; `allow_missing` attaches the rest, if there
    is any), ConflictError where the name is taken.

    >>> import torch
    >>> from krona_hub.kron.terms import KronTerms
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> delta = LayerDelta((KronTerms(torch.ones(1, 2, 2), torch.ones(1, 1, 2)),), (2, 4))
    >>> print(attach(model, Adapter({"unet.0": delta}), "toy", scale=0.5))
    toy: 1 of 1 modules
    >>> detach(model, "toy")
    >>> model
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
    )
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
    _carry_out(found, name, scale, trainable)
    guard(parts.values())
    return _report(name, adapter, own, missing)


def _parts(model: Any, adapter: Adapter, component: str | None) -> dict[str, nn.Module]:
    """As `parts_of`; a lone model is the component that it fits, where its class leaves several."""
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
    notes += [f"not applied, as they are no weight deltas: {abbreviated(extras)}"] if extras else []
    causes = {layer: error.cause for layer, error in missing.items()}
    return AttachReport(name, matched, causes, elsewhere, extras, tuple(notes))


def detach(model: Any, name: str | None = None, *, component: str | None = None) -> None:
    """Take one adapter away, or all that were attached: the modules of the model are again the very ones it had.

    What is fused is taken out of the weights first, for all adapters. Layers that you made yourself stay, unless
    `name` is theirs. Raises NotFoundError where no adapter has this name.
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
    """Other numbers in the place of an attached adapter of the same layers, shapes and terms; its scale stays.

    They are copied into the tensors that are there, so that nothing is compiled again. Raises BaseMismatchError where
    the adapter changes other layers, ShapeError where a shape or a number of terms differs; nothing is changed then.
    """
    parts = _parts(model, adapter, component)
    slots = kron_layers(parts)
    check_not_fused(slots.values())
    new = {layer: d for layer, d in adapter.layers.items() if layer.partition(".")[0] in parts}
    _check_same_layers(held(slots, name), new)
    found, missing = placings(new, parts)
    _check_matched(new, missing, parts, False)
    branches = [branch_at(placing.slot, name) for placing in found]
    for placing, (_, branch) in zip(found, branches, strict=True):
        if not branch.fits(placing.delta):
            raise ShapeError(
                f"{placing.layer}: the new factors have other sizes ({_told(placing.delta)}, not "
                f"{_told(branch.value)}).",
                fix="Detach the old adapter and attach the new one.",
            )
    for placing, (layer, branch) in zip(found, branches, strict=True):
        branch.take(placing.delta, layer.readable_weight)


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_free(name: str, parts: Parts) -> None:
    if name in names_of(kron_layers(parts).values()):
        raise ConflictError(
            f"an adapter {name!r} is attached already.", fix="Detach it, swap its numbers, or choose another name."
        )


def _check_matched(deltas: Deltas, missing: Problems, parts: Parts, allow_missing: bool) -> None:
    if not deltas:
        raise BaseMismatchError(
            f"the adapter has nothing for {', '.join(parts)}.", fix="adapter.components says what it changes."
        )
    if not missing or (allow_missing and len(missing) < len(deltas)):
        return
    first, error = next(iter(missing.items()))
    rest = len(deltas) - len(missing)
    raise BaseMismatchError(
        f"{rest} of {len(deltas)} modules match; not {abbreviated(missing)}. {first}: {error.cause}",
        fix=f"{error.fix} allow_missing=True attaches the other {rest}." if rest else error.fix,
    )


def _check_same_layers(old: Iterable[str], new: Iterable[str]) -> None:
    other = sorted(set(old) ^ set(new))
    if other:
        raise BaseMismatchError(
            f"the adapter does not change the same layers: {len(other)} differ, {abbreviated(other)}.",
            fix="Detach the old adapter and attach the new one.",
        )


def _told(delta: LayerDelta) -> str:
    return " + ".join(f"{s.terms} of {s.shape}" for s in delta.sums) + (
        " with DoRA" if delta.magnitude is not None else ""
    )


# --- changes of the tree ---------------------------------------------------------------------------------------------


def _carry_out(found: Iterable[Placing], name: str, scale: float, trainable: bool) -> None:
    """All of it, or nothing."""
    done: list[Slot] = []
    try:
        for placing in found:
            _place(placing, name, scale, trainable)
            done.append(placing.slot)
    except BaseException as error:
        for slot in done:
            _strip(slot, name)
        if isinstance(error, KronaError):
            raise error.within(placing.layer) from None
        raise


def _place(placing: Placing, name: str, scale: float, trainable: bool) -> None:
    slot, module = placing.slot, placing.slot.module
    if trainable and placing.parts:  # gradients would reach the rows of the other layers
        raise UnsupportedError(
            "factors in a fused projection cannot be trained.", fix="Call unfuse_qkv_projections() first."
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
    """Without the adapter of that name, or without all that were attached; without the layer where none is left."""
    layer = slot.module
    if not isinstance(layer, KronLayer):
        return
    for key, branch in list(layer.adapters()):
        if key == name or (name is None and not branch.stored):
            layer.remove(key)
    if layer.placed and not len(layer.branches):
        setattr(slot.parent, slot.key, layer.base)


def refuse(*_: Any, **__: Any) -> NoReturn:
    """Stands in for those methods: after them a model would compute without its adapters, and say nothing."""
    raise ConflictError(
        "adapters are attached to the projections that this call would replace.",
        fix="Detach (or unload) them first, and load them again afterwards: fused projections are adapted too.",
    )


def guard(models: Iterable[nn.Module]) -> None:
    """Put the refusal before the class's methods, on these models alone."""
    for model in models:
        vars(model).update({name: refuse for name in REBUILDING if hasattr(type(model), name)})


def release(models: Iterable[nn.Module]) -> None:
    """The class's methods again."""
    for model in models:
        for name in REBUILDING:
            if vars(model).get(name) is refuse:
                del vars(model)[name]
