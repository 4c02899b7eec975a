"""The modules of a model or pipeline by their canonical names, ignoring wrappers of other libraries."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from krona_hub.adapters.adapter import COMPONENTS
from krona_hub.errors import AmbiguousError, BaseMismatchError, UsageError
from krona_hub.layers.kron_layer import KronLayer, core

Range = tuple[int, int]  # first row, and one past the last
UNKNOWN = "model"  # the component of a lone model of unknown class
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FUSED: Mapping[str, tuple[str, ...]] = {  # fused by diffusers' fuse_qkv_projections -> its rows, from the top
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


class Slot(NamedTuple):
    """The position of a module in a model, optionally restricted to some of its rows."""

    parent: nn.Module
    key: str
    rows: Range | None = None  # None: all

    @property
    def module(self) -> nn.Module:
        module: nn.Module = getattr(self.parent, self.key)
        return module

    @property
    def position(self) -> tuple[int, str]:
        """Key that is equal for slots of one module."""
        return id(self.parent), self.key

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        """The shape of the slot's rows; None unless the module is a linear layer or a convolution."""
        shape = weight_shape_of(self.module)
        return (self.rows[1] - self.rows[0], *shape[1:]) if shape and self.rows else shape


class Owner(NamedTuple):
    """The module that computes with the parameters of a path, optionally with some of their rows only."""

    module: nn.Module
    rows: Range | None = None  # None: all


# --- components ------------------------------------------------------------------------------------------------------


def parts_of(target: Any, wanted: Collection[str] = (), component: str | None = None) -> dict[str, nn.Module]:
    """Return component -> model for a pipeline, or for a lone model.

    A lone model is `component`, else the only component in `wanted`, else the one of its class. Raises UsageError for
    any other object and for an unknown component, AmbiguousError if the model may be one of several components.
    """
    if component is not None and component not in COMPONENTS:
        raise UsageError(f"Unknown component {component!r}.", fix=f"Choose one of {', '.join(COMPONENTS)}.")
    if isinstance(target, nn.Module):
        model = unwrapped(target)
        return {component or _component_of(model, wanted): model}
    parts = {c: unwrapped(m) for c in COMPONENTS if isinstance(m := getattr(target, c, None), nn.Module)}
    if not parts:
        raise UsageError(
            f"A {type(target).__name__} is neither a model nor a pipeline with one.",
            fix="Use a torch module or a diffusers pipeline.",
        )
    if component is not None and component not in parts:
        raise BaseMismatchError(
            f"The pipeline has no {component}, only {', '.join(parts)}.", fix="Load the pipeline with it."
        )
    return {component: parts[component]} if component else parts


def models_of(target: Any, component: str | None = None) -> dict[str, nn.Module]:
    """Like `parts_of`, but a lone model of unknown class is called `model`."""
    if isinstance(target, nn.Module) and component is None:
        model = unwrapped(target)
        return {kind_of(model) or UNKNOWN: model}
    return parts_of(target, (), component)


def _component_of(model: nn.Module, wanted: Collection[str]) -> str:
    if len(wanted) == 1:
        return next(iter(wanted))
    kind = kind_of(model)
    fitting = [c for c in wanted if kind is None or c.startswith(kind)]
    if len(fitting) > 1 or (kind is None and not fitting):
        raise AmbiguousError(
            f"A {type(model).__name__} may be any of {', '.join(fitting or COMPONENTS)}.", fix="Specify component=…"
        )
    return fitting[0] if fitting else str(kind)


def kind_of(model: nn.Module) -> str | None:
    """Return the (first) component of models of this class; None for any other class.

    >>> kind_of(nn.Linear(2, 2)) is None
    True
    """
    kind = type(model)
    if "UNet" in kind.__name__:
        return "unet"
    if "Transformer" in kind.__name__ and kind.__module__.startswith("diffusers."):
        return "transformer"
    return "text_encoder" if kind.__module__.startswith("transformers.") else None


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DataParallel and PEFT's PeftModel."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    if "_orig_mod" in module._modules:
        return module._modules["_orig_mod"]
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner: nn.Module = module.module
        return inner
    if "base_model" in module._modules and hasattr(module, "get_base_model"):
        base: nn.Module = module.get_base_model()  # type: ignore[operator]
        return base
    return None


# --- modules ---------------------------------------------------------------------------------------------------------


def slots_of(parts: Mapping[str, nn.Module]) -> dict[str, Slot]:
    """Return canonical layer -> slot of every linear layer and convolution, or its rows in a fused projection."""
    return {
        f"{component}.{path}": slot
        for component, model in parts.items()
        for path, slot in {**_plain(model), **_fused(model)}.items()
    }


def owners_of(parts: Mapping[str, nn.Module]) -> dict[str, Owner]:
    """Return `component` or `component.path` -> owner of the parameters there, inside all wrappers."""
    owners = {component: Owner(model) for component, model in parts.items()}
    for component, model in parts.items():
        for path, slot in _walk(model, ""):
            owners[f"{component}.{path.removeprefix('text_model.')}"] = Owner(_innermost(slot.module))
        for path, slot in _fused(model).items():
            owners[f"{component}.{path}"] = Owner(_innermost(slot.module), slot.rows)
    return owners


def _innermost(module: nn.Module) -> nn.Module:
    while (inner := module.base if isinstance(module, KronLayer) else core(unwrapped(module))) is not module:
        module = inner
    return module


def kron_layers(parts: Mapping[str, nn.Module]) -> dict[str, Slot]:
    """Return `component.path` -> slot of every KronLayer, in the order of the model."""
    return {
        f"{component}.{path}": slot
        for component, model in parts.items()
        for path, slot in _plain(model).items()
        if isinstance(slot.module, KronLayer)
    }


def _plain(model: nn.Module) -> dict[str, Slot]:
    walked = {path.removeprefix("text_model."): slot for path, slot in _walk(model, "")}
    return {path: slot for path, slot in walked.items() if weight_shape_of(slot.module) is not None}


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Slot]]:
    for key, child in module._modules.items():
        if child is None:
            continue
        yield prefix + key, Slot(module, key)
        inner = unwrapped(child)
        if not isinstance(inner, KronLayer) and core(inner) is inner:
            yield from _walk(inner, f"{prefix}{key}.")


def _fused(model: nn.Module) -> dict[str, Slot]:
    """Return path -> rows of the fused projection that replaced it: the original module is no longer called."""
    found = {}
    for name, attention in model.named_modules():
        if getattr(attention, "fused_projections", False) is True:
            path = f"{name.replace('_orig_mod.', '')}." if name else ""
            found.update({path + part: slot for part, slot in _rows_of(attention)})
    return found


def _rows_of(attention: nn.Module) -> Iterator[tuple[str, Slot]]:
    for key, parts in FUSED.items():
        if key not in attention._modules:
            continue
        start = 0
        for part in parts:
            shape = weight_shape_of(getattr(attention, part))
            stop = start + (shape[0] if shape else 0)
            yield part, Slot(attention, key, (start, stop))
            start = stop


def weight_shape_of(module: nn.Module) -> tuple[int, ...] | None:
    """Return (out, in) or (out, in / groups, k, …), even for a packed weight; None for other modules.

    >>> weight_shape_of(nn.Conv2d(8, 12, 3, groups=2)), weight_shape_of(nn.SiLU())
    ((12, 4, 3, 3), None)
    """
    if isinstance(module, KronLayer):
        return module.weight_shape
    inner: Any = core(unwrapped(module))
    if isinstance(inner, CONVOLUTIONS):
        return (inner.out_channels, inner.in_channels // inner.groups, *inner.kernel_size)
    sizes = getattr(inner, "out_features", None), getattr(inner, "in_features", None)
    linear = all(isinstance(size, int) for size in sizes) and not inner._modules
    return (int(sizes[0]), int(sizes[1])) if linear else None  # type: ignore[arg-type]
