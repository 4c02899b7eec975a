"""Where the layers of an adapter are in a model in memory: names to modules, through the wrappers of other tools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from krona_hub.adapter import COMPONENTS, Adapter
from krona_hub.errors import AmbiguousError, ConflictError, UsageError
from krona_hub.layers.layer import KronLayer

WRAPPERS = ("_orig_mod", "module")  # of torch.compile and of data parallel training
FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")  # what diffusers' fused attention skips


class Place(NamedTuple):
    """A child of a module, which can be replaced."""

    parent: nn.Module
    key: str

    @property
    def module(self) -> nn.Module:
        return self.parent.get_submodule(self.key)

    def put(self, module: nn.Module) -> None:
        """Set the child, in containers too."""
        self.parent._modules[self.key] = module


Parts = Mapping[str, nn.Module]  # component -> model


def models_of(model: Any) -> dict[str, nn.Module]:
    """Component -> model of a pipeline, the models that adapters are for; {} for a lone model."""
    if isinstance(model, nn.Module):
        return {}
    found = {name: getattr(model, name, None) for name in COMPONENTS}
    return {name: unwrapped(part) for name, part in found.items() if isinstance(part, nn.Module)}


def parts_of(model: Any, adapter: Adapter, component: str | None) -> dict[str, nn.Module]:
    """Component -> the model that holds it. Raises AmbiguousError where a lone model may be several of them."""
    if component is not None and component not in COMPONENTS:
        raise UsageError(f"{component!r} is no component.", fix=f"One of: {', '.join(COMPONENTS)}.")
    models = models_of(model)
    if models:
        return {name: part for name, part in models.items() if component in (None, name)}
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"a {type(model).__name__} has no models in it.", fix="Give a pipeline of diffusers, or a module."
        )
    return {component or _component_of(model, adapter): unwrapped(model)}


def _component_of(model: nn.Module, adapter: Adapter) -> str:
    """Which of the adapter's components a lone model is: the only one, or the only one that all fits."""
    if len(adapter.components) == 1:
        return adapter.components[0]
    inner = unwrapped(model)
    fits = [c for c in adapter.components if all(find({c: inner}, layer) for layer in layers_in(adapter, (c,)))]
    if len(fits) == 1:
        return fits[0]
    raise AmbiguousError(
        f"the adapter is for {', '.join(adapter.components) or 'nothing'}; which one a {type(inner).__name__} is, its "
        "names do not say.",
        fix="Give component=, or attach to the pipeline.",
    )


def layers_in(adapter: Adapter, components: tuple[str, ...]) -> list[str]:
    """The adapter's layers of these components."""
    return [layer for layer in adapter.layers if layer.split(".", 1)[0] in components]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and data parallel wrappers, which hold it as their only child."""
    while len(model._modules) == 1 and (inner := next((model._modules.get(w) for w in WRAPPERS), None)) is not None:
        model = inner
    return model


def find(parts: Parts, layer: str) -> Place | None:
    """The place of a canonical layer name. Raises ConflictError where diffusers would not call it."""
    component, _, path = layer.partition(".")
    model = parts.get(component)
    places = (_place(model, name) for name in (path, f"text_model.{path}")) if model is not None else ()
    found = next((place for place in places if place is not None), None)
    if found is not None and found.key in FUSED and getattr(found.parent, "fused_projections", False):
        raise ConflictError(
            f"{layer}: the query, key and value of this attention are fused into one layer, which runs instead.",
            fix="Call unfuse_qkv_projections() first.",
        )
    return found


def _place(model: nn.Module, path: str) -> Place | None:
    parent: Any = model
    *heads, key = path.split(".")
    for head in heads:
        parent = parent._modules.get(head) if isinstance(parent, nn.Module) else None
    return Place(parent, key) if isinstance(parent, nn.Module) and parent._modules.get(key) is not None else None


def adapted(model: Any) -> Iterator[tuple[str, Place, KronLayer]]:
    """Name, place and module of every KronLayer in a model or pipeline; names as in the layers of an adapter."""
    models = models_of(model) or {"": unwrapped(model)}
    for component, part in models.items():
        for name, parent in list(part.named_modules()):
            for key, child in list(parent._modules.items()):
                if isinstance(child, KronLayer):
                    yield ".".join(filter(None, (component, name, key))), Place(parent, key), child
