"""The in-memory adapter, common to all file formats.

An Adapter is a mapping from canonical layer names to LayerDelta values. The ΔW of a layer is defined only here;
alpha, rank and all other scales exist only inside `krona_hub.formats`.

Canonical names are `<component>.<diffusers module path>` without `text_model.`, for example
`unet.mid_block.attentions.0.proj_in` or `text_encoder.encoder.layers.0.mlp.fc1`. Layers of an unknown base model have
the names of `krona_hub.adapters.unknown_base`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from krona_hub.adapters.provenance import COMPONENTS, BaseModel, Provenance
from krona_hub.adapters.unknown_base import UNKNOWN
from krona_hub.errors import NotFoundError, ShapeError, UnknownBaseError
from krona_hub.kron.terms import KronTerms

__all__ = ["COMPONENTS", "Adapter", "Axis", "BaseModel", "LayerDelta", "Provenance", "canonical_name", "dora_weight"]

Axis = Literal["out", "in"]


@dataclass(frozen=True, eq=False)
class LayerDelta:
    """The change of one weight: a tuple of Kronecker sums, and an optional DoRA magnitude.

    Frozen. Raises ShapeError if the sums or the magnitude do not fit the weight.

    Parameters
    ----------
    sums : tuple of KronTerms
        The Kronecker sums, each of full size (out, in·k…); they are added up.
    weight_shape : tuple of int
        (out, in) for linear layers, (out, in / groups, k, …) for convolutions.
    magnitude, magnitude_axis : Tensor, optional; {"out", "in"}, default "out"
        The DoRA magnitude, (out,) or (in,) according to the axis (Liu et al., 2024, arXiv:2402.09353).

    Examples
    --------
    >>> from krona_hub import KronTerms
    >>> delta = LayerDelta((KronTerms(torch.ones(1, 2, 2), torch.ones(1, 2, 3)),), (4, 6))
    >>> delta.parameters, tuple(delta.dense().shape)
    (10, (4, 6))
    """

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
                    fix="Choose a1·b1 = out and a2·b2 = the product of the other sizes.",
                )
        if self.magnitude is not None and tuple(self.magnitude.shape) != (self._magnitude_length,):
            raise ShapeError(
                f"a magnitude of shape {tuple(self.magnitude.shape)} does not fit the weight {self.weight_shape}.",
                fix=f"For DoRA on the {self.magnitude_axis}put axis, pass shape ({self._magnitude_length},).",
            )

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in·k…), the size of the weight flattened from dimension 1."""
        return self.weight_shape[0], prod(self.weight_shape[1:])

    @property
    def _magnitude_length(self) -> int:
        return self.weight_shape[0 if self.magnitude_axis == "out" else 1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All stored tensors, the magnitude last."""
        own = () if self.magnitude is None else (self.magnitude,)
        return tuple(t for s in self.sums for t in s.tensors) + own

    @property
    def parameters(self) -> int:
        """Number of stored values."""
        return sum(t.numel() for t in self.tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerDelta:
        """Apply `change` to every stored tensor, for example to convert the dtype or move it to a device."""
        magnitude = None if self.magnitude is None else change(self.magnitude)
        return replace(self, sums=tuple(s.map(change) for s in self.sums), magnitude=magnitude)

    def low_rank_delta(self) -> Tensor:
        """Return Σ A ⊗ B in the shape of the weight, before the DoRA normalization; at least float32."""
        device = self.tensors[0].device if self.tensors else None
        total = torch.zeros(self.matrix_shape, device=device)
        for s in self.sums:
            dense = s.dense()
            total = total.to(torch.promote_types(total.dtype, dense.dtype)) + dense
        return total.reshape(self.weight_shape)

    def dense(self, base_weight: Tensor | None = None) -> Tensor:
        """Return ΔW in the shape of the weight, which is added to the base weight at strength 1; at least float32.

        With a DoRA magnitude m, ΔW is (W + D)·m/‖W + D‖ − W (Liu et al., 2024) with D = Σ A ⊗ B, where the norm is
        computed per output row or per input column. Raises UnknownBaseError if W is required but missing.
        """
        delta = self.low_rank_delta()
        if self.magnitude is None:
            return delta
        if base_weight is None:
            raise UnknownBaseError(
                "the delta of a DoRA layer depends on its base weight, which is missing.",
                fix="Specify the base model with --base (a diffusers folder or a checkpoint file).",
            )
        if prod(base_weight.shape) != prod(self.weight_shape) or len(base_weight) != self.weight_shape[0]:
            raise ShapeError(
                f"the base weight has shape {tuple(base_weight.shape)}, but the adapter expects {self.weight_shape}.",
                fix="Specify the base model that the adapter was trained on.",
            )
        base = base_weight.reshape(self.weight_shape).to(delta.dtype)
        return dora_weight(base + delta, self.magnitude.to(delta.dtype), self.magnitude_axis) - base


def vector_delta(vector: Tensor) -> LayerDelta:
    """Return what is added to a parameter as 1 ⊗ v, flat, since files store bare parameters in several shapes."""
    return LayerDelta((KronTerms(torch.ones(1, 1, 1), vector.reshape(1, -1, 1)),), (vector.numel(),))


def dora_weight(directed: Tensor, magnitude: Tensor, axis: Axis) -> Tensor:
    """Return V·m/‖V‖ with one norm per output row (`out`) or per input channel (`in`); zero rows stay zero."""
    return directed * dora_gain(directed, magnitude, axis)


def dora_gain(directed: Tensor, magnitude: Tensor, axis: Axis) -> Tensor:
    """Return m/‖V‖ in a shape that broadcasts to V: (out, 1, …) or (1, in, 1, …)."""
    kept = 0 if axis == "out" else 1
    others = [d for d in range(directed.ndim) if d != kept]
    norm = torch.linalg.vector_norm(directed, dim=others, keepdim=True)
    gain: Tensor = magnitude.reshape(norm.shape) / norm.clamp_min(torch.finfo(directed.dtype).tiny)
    return gain


def _frozen(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(values))


@dataclass(frozen=True, eq=False)
class Adapter(Mapping[str, LayerDelta]):
    """A mapping from layer names to LayerDelta values, with vectors, a base model and a provenance.

    Adapters are frozen: functions return new ones. Layer names are canonical; lookups also accept names that contain
    `text_model.`, and raise NotFoundError for unknown ones. Two adapters are equal only if they are the same object;
    use `krona_hub.verify` to compare their deltas.

    Parameters
    ----------
    layers : mapping of str to LayerDelta
        The layers by name, such as ``unet.mid_block.attentions.0.proj_in``.
    base : BaseModel, optional
        The base model of the adapter, if known.
    provenance : Provenance, optional
        Origin, measured errors and training record of the adapter.
    extras : mapping of str to Tensor, optional
        Tensors that change no parameter of the base model: embeddings of new words.
    vectors : mapping of str to Tensor, optional
        What is added, at strength 1, to biases, to weights of norms and to other parameters that are not weights of
        layers: parameter name, such as ``unet.conv_in.bias`` -> tensor of the parameter's shape.

    Examples
    --------
    >>> from krona_hub.kron.terms import as_lora
    >>> delta = LayerDelta((as_lora(torch.ones(4, 2), torch.ones(2, 6)),), (4, 6))
    >>> adapter = Adapter({"text_encoder.text_model.encoder.layers.0.mlp.fc1": delta})
    >>> list(adapter), "text_encoder.encoder.layers.0.mlp.fc1" in adapter, adapter.get("unet.conv_in") is None
    (['text_encoder.encoder.layers.0.mlp.fc1'], True, True)
    """

    layers: Mapping[str, LayerDelta]
    base: BaseModel | None = None
    provenance: Provenance = field(default_factory=Provenance)
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # not deltas: embeddings
    vectors: Mapping[str, Tensor] = field(default_factory=dict)  # parameter -> delta: biases, norms

    def __post_init__(self) -> None:
        layers = {canonical_name(name): delta for name, delta in sorted(self.layers.items())}
        object.__setattr__(self, "layers", _frozen(layers))
        object.__setattr__(self, "extras", _frozen(self.extras))
        vectors = {canonical_name(name): vector for name, vector in sorted(self.vectors.items())}
        object.__setattr__(self, "vectors", _frozen(vectors))

    def __getitem__(self, layer: str) -> LayerDelta:
        """Return the delta of a layer, with or without `text_model.`; NotFoundError suggests the nearest name."""
        name = canonical_name(layer)
        if name not in self.layers:
            from difflib import get_close_matches

            near = get_close_matches(name, self.layers, n=1)
            raise NotFoundError(
                f"the adapter has no layer {layer!r}.",
                fix=f"Did you mean {near[0]!r}?" if near else "List the layers with adapter.layers.",
            )
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, str) and canonical_name(layer) in self.layers

    def delta(self, name: str) -> LayerDelta:
        """Return the delta of a layer, or that of a parameter: its vector, flat, as one dense factor.

        Raises NotFoundError for a name that is neither.
        """
        vector = self.vectors.get(canonical_name(name))
        return self[name] if vector is None else vector_delta(vector)

    def get(self, layer: str, default: Any = None) -> Any:
        """Return the delta of a layer, or `default`."""
        return self.layers.get(canonical_name(layer), default)

    __eq__ = object.__eq__  # comparing tensors does not give a single bool
    __hash__ = object.__hash__

    @property
    def parameters(self) -> int:
        """Number of stored values in all layers and vectors."""
        return sum(delta.parameters for delta in self.layers.values()) + sum(v.numel() for v in self.vectors.values())

    @property
    def components(self) -> tuple[str, ...]:
        """The components of the layers and vectors, in the order of COMPONENTS; then UNKNOWN."""
        present = {name.split(".", 1)[0] for name in (*self.layers, *self.vectors)}
        return tuple(c for c in (*COMPONENTS, UNKNOWN) if c in present)

    def with_layers(self, layers: Mapping[str, LayerDelta]) -> Adapter:
        """Return the same adapter with other layers and the same vectors."""
        return replace(self, layers=layers)


def canonical_name(layer: str) -> str:
    """Remove `text_model.` from a layer name, which transformers 5 dropped from some encoders but not from others.

    >>> canonical_name("text_encoder.text_model.encoder.layers.0.mlp.fc1")
    'text_encoder.encoder.layers.0.mlp.fc1'
    """
    component, _, path = layer.partition(".")
    if component.startswith("text_encoder"):
        path = path.removeprefix("text_model.")
    return f"{component}.{path}"
