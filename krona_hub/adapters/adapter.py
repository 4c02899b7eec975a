"""The adapter in memory: what every file means, whatever its format.

An Adapter is a mapping from canonical layer names to LayerDelta values. The ΔW of a layer is defined
here and nowhere else; alpha, rank and every other scale exist only inside `krona_hub.formats`.

Canonical names are `<component>.<diffusers module path>` without `text_model.`, for example
`unet.mid_block.attentions.0.proj_in` or `text_encoder.encoder.layers.0.mlp.fc1`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from krona_hub.adapters.provenance import BaseModel, Provenance
from krona_hub.errors import NotFoundError, ShapeError, UnknownBaseError
from krona_hub.kron.terms import KronTerms

__all__ = ["COMPONENTS", "Adapter", "Axis", "BaseModel", "LayerDelta", "Provenance", "canonical_name", "dora_weight"]

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
Axis = Literal["out", "in"]


@dataclass(frozen=True, eq=False)
class LayerDelta:
    """What an adapter adds to one weight: a tuple of Kronecker sums, and a DoRA magnitude where there is one."""

    sums: tuple[KronTerms, ...]
    weight_shape: tuple[int, ...]  # (out, in) or (out, in / groups, k, …)
    magnitude: Tensor | None = None  # (out,) or (in,), DoRA
    magnitude_axis: Axis = "out"

    def __post_init__(self) -> None:
        for s in self.sums:
            if s.shape.full != self.matrix_shape:
                raise ShapeError(
                    f"{s.shape} is a delta of {s.shape.full}, but the weight {self.weight_shape} is "
                    f"{self.matrix_shape} as a matrix.",
                    fix="a1·b1 must be out, and a2·b2 the product of the other sizes.",
                )
        if self.magnitude is not None and tuple(self.magnitude.shape) != (self._magnitude_length,):
            raise ShapeError(
                f"a magnitude of {tuple(self.magnitude.shape)} does not fit the weight {self.weight_shape}.",
                fix=f"DoRA on the {self.magnitude_axis}put axis needs ({self._magnitude_length},).",
            )

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in·k…): the weight flattened from dimension 1."""
        return self.weight_shape[0], prod(self.weight_shape[1:])

    @property
    def _magnitude_length(self) -> int:
        return self.weight_shape[0 if self.magnitude_axis == "out" else 1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every stored tensor, the magnitude last."""
        own = () if self.magnitude is None else (self.magnitude,)
        return tuple(t for s in self.sums for t in s.tensors) + own

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerDelta:
        """The same delta with every stored tensor changed: to another dtype, to another device."""
        magnitude = None if self.magnitude is None else change(self.magnitude)
        return replace(self, sums=tuple(s.map(change) for s in self.sums), magnitude=magnitude)

    def low_rank_delta(self) -> Tensor:
        """Σ A ⊗ B in the shape of the weight, before any DoRA step; float32 at least."""
        device = self.tensors[0].device if self.tensors else None
        total = torch.zeros(self.matrix_shape, device=device)
        for s in self.sums:
            dense = s.dense()
            total = total.to(torch.promote_types(total.dtype, dense.dtype)) + dense
        return total.reshape(self.weight_shape)

    def dense(self, base_weight: Tensor | None = None) -> Tensor:
        """ΔW in the shape of the weight: what is added to the base weight at strength 1; float32 at least.

        With a DoRA magnitude m this is (W + D)·m/‖W + D‖ − W (Liu et al., 2024), D = Σ A ⊗ B, the norm
        taken per output row or per input column. Raises UnknownBaseError where W is needed and missing.
        """
        delta = self.low_rank_delta()
        if self.magnitude is None:
            return delta
        if base_weight is None:
            raise UnknownBaseError(
                "a DoRA layer has no delta without its base weight.",
                fix="Give the base weights with --base (a diffusers folder or checkpoint file).",
            )
        if prod(base_weight.shape) != prod(self.weight_shape) or len(base_weight) != self.weight_shape[0]:
            raise ShapeError(
                f"the base weight is {tuple(base_weight.shape)}, the adapter expects {self.weight_shape}.",
                fix="Give the base model that the adapter was trained on.",
            )
        base = base_weight.reshape(self.weight_shape).to(delta.dtype)
        return dora_weight(base + delta, self.magnitude.to(delta.dtype), self.magnitude_axis) - base


def dora_weight(directed: Tensor, magnitude: Tensor, axis: Axis) -> Tensor:
    """V·m/‖V‖ with one norm per output row (`out`) or per input channel (`in`); zero rows stay zero."""
    return directed * dora_gain(directed, magnitude, axis)


def dora_gain(directed: Tensor, magnitude: Tensor, axis: Axis) -> Tensor:
    """m/‖V‖ in a shape that multiplies V: (out, 1, …) or (1, in, 1, …)."""
    kept = 0 if axis == "out" else 1
    others = [d for d in range(directed.ndim) if d != kept]
    norm = torch.linalg.vector_norm(directed, dim=others, keepdim=True)
    gain: Tensor = magnitude.reshape(norm.shape) / norm.clamp_min(torch.finfo(directed.dtype).tiny)
    return gain


def _frozen(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(values))


@dataclass(frozen=True, eq=False)
class Adapter(Mapping[str, LayerDelta]):
    """A mapping of layer names to LayerDelta, with what is known about its base model and its origin.

    It is frozen: functions return new adapters. Layer names are canonical; look-ups accept `text_model.` in them, too.
    Two adapters are equal only where they are the same object: compare deltas with `krona_hub.verify`.

    >>> from krona_hub.kron.terms import as_lora
    >>> delta = LayerDelta((as_lora(torch.ones(4, 2), torch.ones(2, 6)),), (4, 6))
    >>> adapter = Adapter({"text_encoder.text_model.encoder.layers.0.mlp.fc1": delta})
    >>> list(adapter), "text_encoder.encoder.layers.0.mlp.fc1" in adapter, adapter.get("unet.conv_in") is None
    (['text_encoder.encoder.layers.0.mlp.fc1'], True, True)
    """

    layers: Mapping[str, LayerDelta]
    base: BaseModel | None = None
    provenance: Provenance = field(default_factory=Provenance)
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # what is no delta: embeddings, norms, biases

    def __post_init__(self) -> None:
        layers = {canonical_name(name): delta for name, delta in sorted(self.layers.items())}
        object.__setattr__(self, "layers", _frozen(layers))
        object.__setattr__(self, "extras", _frozen(self.extras))

    def __getitem__(self, layer: str) -> LayerDelta:
        """The delta of a layer, with or without `text_model.` in its name; NotFoundError names the nearest."""
        name = canonical_name(layer)
        if name not in self.layers:
            from difflib import get_close_matches

            near = get_close_matches(name, self.layers, n=1)
            raise NotFoundError(
                f"the adapter has no layer {layer!r}.",
                fix=f"Did you mean {near[0]!r}?" if near else "adapter.layers lists what it has.",
            )
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, str) and canonical_name(layer) in self.layers

    def get(self, layer: str, default: Any = None) -> Any:
        """The delta of a layer, or `default`."""
        return self.layers.get(canonical_name(layer), default)

    __eq__ = object.__eq__  # a comparison of tensors is no yes or no
    __hash__ = object.__hash__

    @property
    def parameters(self) -> int:
        return sum(delta.parameters for delta in self.layers.values())

    @property
    def components(self) -> tuple[str, ...]:
        """The components that the layers belong to, in the order of COMPONENTS."""
        present = {name.split(".", 1)[0] for name in self.layers}
        return tuple(c for c in COMPONENTS if c in present)

    def with_layers(self, layers: Mapping[str, LayerDelta]) -> Adapter:
        """The same adapter with other layers."""
        return replace(self, layers=layers)


def canonical_name(layer: str) -> str:
    """The name without `text_model.`, which transformers 5 dropped from some encoders and kept in others.

    >>> canonical_name("text_encoder.text_model.encoder.layers.0.mlp.fc1")
    'text_encoder.encoder.layers.0.mlp.fc1'
    """
    component, _, path = layer.partition(".")
    if component.startswith("text_encoder"):
        path = path.removeprefix("text_model.")
    return f"{component}.{path}"
