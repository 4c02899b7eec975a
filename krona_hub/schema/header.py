"""Conversion of `krona.header`, version 1.0, between the JSON text of a native file and plain values. Torch-free.

Unknown fields are preserved in their positions and written back, so files of newer minor versions survive a round trip.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from krona_hub.adapters.provenance import BaseModel, Provenance
from krona_hub.checkpoints import strict_json
from krona_hub.checkpoints.findings import Finding, quoted
from krona_hub.errors import SchemaError, StructureError, UsageError
from krona_hub.schema import fields as table

Rows = Literal["kron", "shuffled"]
Axis = Literal["out", "in"]
SCHEMA_KEY, HEADER_KEY = "krona.schema", "krona.header"  # in the metadata of the file
ERROR_DIGITS = 6  # significant digits of relative errors in the header


@dataclass(frozen=True)
class LayerFacts:
    """Properties of a layer that its tensors do not determine."""

    weight_shape: tuple[int, ...] | None = None  # None: (out, in) of the first sum
    rows: tuple[Rows, ...] = ()  # one per sum; (): all "kron"
    magnitude_axis: Axis = "out"


@dataclass(frozen=True)
class NativeHeader:
    """The header as plain values; `provenance.unknown` contains its unknown fields."""

    base: BaseModel | None = None
    provenance: Provenance = field(default_factory=Provenance)
    layers: Mapping[str, LayerFacts] = field(default_factory=dict)
    layer_errors: tuple[float | None, ...] = ()  # in the order of the sorted layer names; (): unknown


def parse(text: str) -> tuple[NativeHeader, tuple[Finding, ...]]:
    """Parse a header, and return its valid part and a finding for every problem.

    >>> parse('{"base": {"family": "sdxl"}, "rating": 5}')[0].provenance.unknown
    {'rating': 5}
    """
    try:
        whole = strict_json.parse(text)
    except StructureError as error:
        return NativeHeader(), (Finding.of(_broken(error), where="krona.header"),)
    top = table.split(whole, table.TOP, "")
    base = table.split(top.known.get("base", {}), table.BASE, "base")
    origin = table.split(top.known.get("provenance", {}), table.PROVENANCE, "provenance")
    layers = {k: table.split(v, table.LAYER, f"layers {quoted(k)}") for k, v in top.known.get("layers", {}).items()}
    known_layers = {name: layer.known for name, layer in layers.items()}
    inner = {"base": base.unknown, "provenance": origin.unknown}
    inner["layers"] = {name: layer.unknown for name, layer in layers.items() if layer.unknown}
    unknown = top.unknown | {k: v for k, v in inner.items() if v}
    header = NativeHeader(
        BaseModel(**_tuples(base.known)) if "base" in top.known else None,
        _provenance(origin.known, top.known, unknown),
        {name: LayerFacts(**_tuples(_without(layer, "op"))) for name, layer in known_layers.items()},
        tuple(origin.known.get("layer_errors", ())),
    )
    parts = (top, base, origin, *layers.values())
    return header, tuple(f for part in parts for f in part.findings) + tuple(table.op_findings(known_layers))


def render(header: NativeHeader) -> str:
    """Return the JSON text of a header: keys sorted, defaults omitted, unknown fields in their original positions.

    Raises UsageError if the training record or an unknown field contains a value that JSON does not support.
    """
    p = header.provenance
    origin = {
        "created_by": p.created_by,
        "source_format": p.source_format,
        "source_sha256": p.source_sha256,
        "method": p.method,
        "relative_error": _rounded(p.relative_error),
        "layer_errors": list(header.layer_errors),
        "metadata": dict(p.metadata),
    }
    known = {
        "layers": _nonempty({name: _plain(facts) for name, facts in header.layers.items()}),
        "provenance": _nonempty(origin),
        "training": dict(p.training),
        "licence": p.licence,
        "trigger_words": list(p.trigger_words),
    }
    base = {} if header.base is None else {"base": _plain(header.base)}  # {"base": {}}: an unknown base model
    return _dumped(_merged(_of_present_layers(p.unknown, header.layers), base | _nonempty(known)))


def ordered_errors(names: Iterable[str], errors: Mapping[str, float]) -> tuple[float | None, ...]:
    """Return relative errors as stored in the header: one per layer, sorted by name; () if none is known.

    >>> ordered_errors(["a", "b"], {"b": 0.25}), ordered_errors(["a"], {})
    ((None, 0.25), ())
    """
    row = tuple(_rounded(errors.get(name)) for name in sorted(names))
    return row if any(error is not None for error in row) else ()


def named_errors(names: Iterable[str], row: tuple[float | None, ...]) -> dict[str, float]:
    """Invert ordered_errors. Raises SchemaError unless the row has one entry per layer."""
    known = sorted(names)
    if row and len(row) != len(known):
        raise SchemaError(
            f"layer_errors has {len(row)} entries for {len(known)} layers.", fix="Write one per layer, or omit it."
        )
    return {name: error for name, error in zip(known, row, strict=False) if error is not None}


def _broken(error: StructureError) -> SchemaError:
    return SchemaError(error.cause, fix="Use the original file: the header was edited and is not valid JSON.")


def _provenance(origin: Mapping[str, Any], top: Mapping[str, Any], unknown: Mapping[str, Any]) -> Provenance:
    own = {key: top[key] for key in ("training", "licence", "trigger_words") if key in top}
    return Provenance(**_tuples(_without(origin, "layer_errors")), **_tuples(own), unknown=unknown)


def _rounded(error: float | None) -> float | None:
    """Round to ERROR_DIGITS digits; NaN and infinite errors become None."""
    return None if error is None or not 0 <= error <= table.MAX_ERROR else float(f"{error:.{ERROR_DIGITS}g}")


def _plain(value: BaseModel | LayerFacts) -> dict[str, Any]:
    """Return the fields of a flat dataclass that differ from their defaults."""
    return {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != key}


def _nonempty(values: Mapping[str, Any]) -> dict[str, Any]:
    """Remove None, empty objects and empty lists."""
    return {k: v for k, v in values.items() if v is not None and v not in ({}, [])}


def _of_present_layers(unknown: Mapping[str, Any], layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the unknown fields, without those of removed layers and without the schema version of their file."""
    kept = {k: v for k, v in unknown.items() if k != SCHEMA_KEY}
    if "layers" in kept:
        kept["layers"] = {k: v for k, v in kept["layers"].items() if k in layers}
    return kept


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two trees; `over` takes precedence."""
    both = {k: _merged(under[k], over[k]) for k in under if _is_tree(under, k) and _is_tree(over, k)}
    return {**under, **over, **both}


def _is_tree(tree: Mapping[str, Any], key: str) -> bool:
    return isinstance(tree.get(key), Mapping)


def _dumped(tree: Mapping[str, Any]) -> str:
    try:
        return json.dumps(tree, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"the header contains a value that JSON does not support: {error}.",
            fix="Use only strings, finite numbers, lists and objects in the training record.",
        ) from None
