"""Conversion between an Adapter and the tensors and metadata of a native file.

A native file stores the factors of ΔW at strength 1 in their own dtypes, without an alpha. Files with vectors have
schema 2.0, all others 1.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.checkpoints.findings import quoted, raise_first
from krona_hub.checkpoints.header import FLOATS, Header
from krona_hub.checkpoints.writer import DTYPE_NAMES
from krona_hub.errors import DtypeError, KronaError, NonFiniteError, ShapeError, UsageError
from krona_hub.kron.hadamard import expanded
from krona_hub.kron.terms import Factor, KronTerms, LowRank, Rows
from krona_hub.schema import modelspec, tensor_layout
from krona_hub.schema.header import HEADER_KEY, SCHEMA_KEY, LayerFacts, NativeHeader, ordered_errors, render
from krona_hub.schema.migrate import CURRENT, FIRST, VECTORS

_FINITE = "Replace the NaN and infinite values; a native file stores only finite numbers."


def to_tensors(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of the native file that represents this adapter exactly.

    Dtypes are kept; empty sums (no terms, or rank 0) are left out. Raises DtypeError or NonFiniteError for values that
    the format cannot store, ShapeError for weights of unsupported shapes, UsageError for invalid layer names.
    """
    layers = {name: _nonempty_sums(delta) for name, delta in adapter.layers.items()}
    magnitudes = {
        f"{n}.{tensor_layout.MAGNITUDE}": d.magnitude for n, d in adapter.layers.items() if d.magnitude is not None
    }
    extras = {f"{tensor_layout.EXTRAS}{name}": tensor for name, tensor in adapter.extras.items()}
    vectors = {f"{VECTORS}{name}": tensor for name, tensor in adapter.vectors.items()}
    tensors = dict(_named(layers)) | magnitudes | extras | vectors
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    p = adapter.provenance
    header = NativeHeader(
        adapter.base,
        p,
        {name: _facts(name, delta, layers[name]) for name, delta in adapter.layers.items()},
        ordered_errors(layers, p.layer_errors),
    )
    version = str(CURRENT if vectors else p.unknown.get(SCHEMA_KEY, FIRST))
    own = {"format": "pt", SCHEMA_KEY: version, HEADER_KEY: render(header)}
    return tensors, modelspec.keys(adapter.base, p) | own


def from_tensors(header: Header, tensors: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter of a native file; `tensors` maps the names in the file to its tensors.

    Raises SchemaError, ShapeError, DtypeError, NonFiniteError or IncompleteError if the file violates its schema,
    NewerSchemaError for a newer major version, UnrecognisedError for another format.
    """
    try:
        known, findings = tensor_layout.examine(header)
    except KronaError as error:
        raise error.within(str(header.path)) from None
    raise_first(findings, str(header.path))
    for name, tensor in tensors.items():
        _check_finite(name, tensor, str(header.path))
    return Adapter(
        {name: _delta(layer, tensors) for name, layer in known.layers.items()},
        known.header.base,
        known.provenance(header.metadata),
        {name: tensors[tensor] for name, tensor in known.extras.items()},
        {name: tensors[tensor] for name, tensor in known.vectors.items()},
    )


def _nonempty_sums(delta: LayerDelta) -> tuple[KronTerms, ...]:
    """Return the sums to store; an elementwise product becomes a low-rank product or a matrix."""
    return tuple(expanded(s) for s in delta.sums if all(t.numel() for t in s.tensors))


def _named(layers: Mapping[str, tuple[KronTerms, ...]]) -> Iterator[tuple[str, Tensor]]:
    for name, sums in layers.items():
        for i, s in enumerate(sums):
            for letter, factor in (("a", s.left), ("b", s.right)):
                for part, tensor in _factor_parts(factor):
                    yield f"{name}.kron_{letter}{part}.{i}", tensor


def _factor_parts(factor: Factor) -> tuple[tuple[str, Tensor], ...]:
    return (("_up", factor.up), ("_down", factor.down)) if isinstance(factor, LowRank) else (("", factor),)


def _facts(name: str, delta: LayerDelta, sums: tuple[KronTerms, ...]) -> LayerFacts:
    """Return the properties of a layer that its tensors do not determine."""
    if name.startswith(tensor_layout.EXTRAS) or not all(name.partition(".")[::2]):
        raise UsageError(f"Invalid layer name {quoted(name)}.", fix="Use the form <component>.<module path>.")
    if not 2 <= len(delta.weight_shape) <= 5 or 0 in delta.weight_shape:
        raise ShapeError(
            f"{quoted(name)}: a weight of shape {list(delta.weight_shape)} is not a linear or convolution layer.",
            fix="Store other tensors in extras.",
        )
    is_implied = bool(sums) and len(delta.weight_shape) == 2
    rows: tuple[Rows, ...] = tuple(s.rows for s in sums)
    return LayerFacts(
        weight_shape=None if is_implied else delta.weight_shape,
        rows=rows if "shuffled" in rows else (),
        magnitude_axis="out" if delta.magnitude is None else delta.magnitude_axis,
    )


def _check_tensor(name: str, tensor: Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if DTYPE_NAMES.get(dtype) not in FLOATS:
        raise DtypeError(
            f"{quoted(name)} has the unsupported dtype {dtype}.", fix=f"Convert it to one of {', '.join(FLOATS)}."
        )
    _check_finite(name, tensor)


def _check_finite(name: str, tensor: Tensor, path: str = "") -> None:
    if not bool(torch.isfinite(tensor).all()):
        error = NonFiniteError(f"{quoted(name)} contains NaN or infinity.", fix=_FINITE)
        raise error.within(path) if path else error


def _delta(layer: tensor_layout.Layer, tensors: Mapping[str, Tensor]) -> LayerDelta:
    return LayerDelta(
        tuple(KronTerms(_loaded(s.left, tensors), _loaded(s.right, tensors), s.rows) for s in layer.sums),
        layer.weight_shape,
        None if layer.magnitude is None else tensors[layer.magnitude],
        layer.magnitude_axis,
    )


def _loaded(factor: tensor_layout.Factor, tensors: Mapping[str, Tensor]) -> Factor:
    stored = [tensors[name] for name in factor.names]
    return stored[0] if len(stored) == 1 else LowRank(stored[0], stored[1])
