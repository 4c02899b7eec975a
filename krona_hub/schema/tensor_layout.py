"""Interpretation of the tensors of a native file from their names and sizes alone. Torch-free.

A tensor is named `<layer>.<part>`: `kron_a.i` (terms, a1, a2) or the pair `kron_a_up.i` (terms, a1, r) and
`kron_a_down.i` (terms, r, a2) for the A of the i-th sum, likewise `kron_b…` for B, `magnitude` for DoRA; since 2.0
`vectors.<parameter>` for what is added to a bias, a norm or another parameter; and `extras.<name>` for embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from krona_hub.adapters.provenance import Provenance
from krona_hub.checkpoints.findings import Finding, quoted
from krona_hub.checkpoints.header import FLOATS, Header, TensorInfo
from krona_hub.errors import DtypeError, IncompleteError, KronaError, SchemaError, ShapeError, UnrecognisedError
from krona_hub.kron.shapes import KronShape
from krona_hub.schema import modelspec
from krona_hub.schema.header import HEADER_KEY, SCHEMA_KEY, Axis, LayerFacts, NativeHeader, Rows, named_errors, parse
from krona_hub.schema.migrate import FIRST, VECTORS, Version, is_newer_minor, readable, version_of

EXTRAS = "extras."
MAGNITUDE = "magnitude"
_PART = re.compile(r"(?P<layer>[^.]+\..+)\.(?P<part>kron_[ab](?:_up|_down)?)\.(?P<index>0|[1-9][0-9]{0,5})", re.DOTALL)
_WHOLE = re.compile(rf"(?P<layer>[^.]+\..+)\.{MAGNITUDE}", re.DOTALL)
_VECTOR = re.compile(rf"{re.escape(VECTORS)}(?P<parameter>[^.]+\..+)", re.DOTALL)
_BROKEN = "Use the original file, or convert it again: this file is incomplete or was edited."


class Factor(NamedTuple):
    """The factor A or B of a sum: the name of its tensor, or the names of up and down."""

    names: tuple[str, ...]
    shape: tuple[int, int, int]  # (terms, p, q), of the product if it is low-rank


class Sum(NamedTuple):
    left: Factor
    right: Factor
    rows: Rows

    @property
    def shape(self) -> KronShape:
        return KronShape(*self.left.shape[1:], *self.right.shape[1:])


class Layer(NamedTuple):
    sums: tuple[Sum, ...]
    weight_shape: tuple[int, ...]
    magnitude: str | None  # name of its tensor
    magnitude_axis: Axis


@dataclass(frozen=True)
class NativeLayout:
    """The interpreted contents of a native file."""

    version: Version  # of the file, before any migration
    header: NativeHeader
    layers: Mapping[str, Layer]
    errors: Mapping[str, float]  # layer -> relative error, where recorded
    extras: Mapping[str, str]  # name -> name of the tensor
    vectors: Mapping[str, str]  # parameter -> name of the tensor

    def provenance(self, metadata: Mapping[str, str]) -> Provenance:
        """Return the provenance of the header, completed from the `metadata` of the file.

        Keys that other applications added are kept, and so is a newer minor version, under its metadata key.
        """
        known = self.header.provenance
        newer = {SCHEMA_KEY: str(self.version)} if is_newer_minor(self.version) else {}
        return replace(
            known,
            layer_errors=self.errors,
            metadata={**known.metadata, **modelspec.added(metadata, self.header.base, known)},
            unknown={**known.unknown, **newer},
        )


Parts = dict[str, str]  # `kron_a.0` -> name of the tensor


def examine(file: Header) -> tuple[NativeLayout, tuple[Finding, ...]]:
    """Return the valid part of a native file and a finding for every problem.

    Raises UnrecognisedError for a file that is not native, NewerSchemaError for a newer major version.
    """
    metadata, version = readable(file.metadata), version_of(file.metadata)
    if HEADER_KEY not in metadata:
        raise SchemaError(f"a native file needs {HEADER_KEY} in its metadata.", fix=_BROKEN)
    header, found = parse(metadata[HEADER_KEY])
    findings = [*found, *_dtype_findings(file.tensors)]
    vectors = _vectors(file.tensors) if version.major > FIRST.major else {}
    findings.extend(_vector_findings(vectors, file.tensors))
    parts, extras, unknown = _grouped(file.tensors.keys() - vectors.values())
    findings.extend(_unknown_tensor(name, version) for name in unknown)
    layers: dict[str, Layer] = {}
    for name in sorted(parts.keys() | header.layers.keys()):
        try:
            layers[name] = _layer(name, parts.get(name, {}), header.layers.get(name, LayerFacts()), file.tensors)
        except KronaError as error:
            findings.append(Finding.of(error, where=quoted(name)))
    errors: dict[str, float] = {}
    try:
        errors = named_errors(parts.keys() | header.layers.keys(), header.layer_errors)
    except SchemaError as error:
        findings.append(Finding.of(error, where="krona.header provenance"))
    return NativeLayout(version, header, layers, errors, extras, vectors), tuple(findings)


def is_native(metadata: Mapping[str, str]) -> bool:
    """Return whether the metadata belongs to a native file of any version."""
    try:
        version_of(metadata)
    except UnrecognisedError:
        return False
    except SchemaError:
        return True
    return True


def _dtype_findings(tensors: Mapping[str, TensorInfo]) -> Iterator[Finding]:
    for name, info in tensors.items():
        if info.dtype not in FLOATS:
            error = DtypeError(f"unsupported dtype {info.dtype}.", fix=f"Save it as one of {', '.join(FLOATS)}.")
            yield Finding.of(error, where=quoted(name))


def _vectors(tensors: Iterable[str]) -> dict[str, str]:
    """Map parameters to the tensors that are added to them."""
    return {match["parameter"]: name for name in tensors if (match := _VECTOR.fullmatch(name))}


def _vector_findings(vectors: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> Iterator[Finding]:
    for parameter, name in vectors.items():
        error: KronaError | None = None
        if 0 in tensors[name].shape or not 1 <= len(tensors[name].shape) <= 5:
            error = ShapeError(f"a vector has 1 to 5 sizes, not {list(tensors[name].shape)[:8]}.", fix=_BROKEN)
        try:
            _check_name(parameter)
        except SchemaError as fault:
            error = fault
        if error is not None:
            yield Finding.of(error, where=quoted(name))


def _grouped(tensors: Iterable[str]) -> tuple[dict[str, Parts], dict[str, str], list[str]]:
    """Group tensors into parts by layer and extras by name; the rest are unknown names."""
    parts: dict[str, Parts] = {}
    extras: dict[str, str] = {}
    unknown = []
    for name in sorted(tensors):
        if name.startswith(EXTRAS) and len(name) > len(EXTRAS):
            extras[name.removeprefix(EXTRAS)] = name
        elif match := _PART.fullmatch(name):
            parts.setdefault(match["layer"], {})[f"{match['part']}.{match['index']}"] = name
        elif match := _WHOLE.fullmatch(name):
            parts.setdefault(match["layer"], {})[MAGNITUDE] = name
        else:
            unknown.append(name)
    return parts, extras, unknown


def _unknown_tensor(name: str, version: Version) -> Finding:
    error = IncompleteError(f"this tensor is not part of schema {version}.", fix=_BROKEN)
    return Finding.of(error, where=quoted(name))


def _layer(name: str, parts: Parts, facts: LayerFacts, tensors: Mapping[str, TensorInfo]) -> Layer:
    """Interpret one layer. Raises SchemaError, IncompleteError or ShapeError without the layer name."""
    _check_name(name)
    count = len({part.rsplit(".", 1)[1] for part in parts if part != MAGNITUDE})
    if facts.rows and len(facts.rows) != count:
        raise SchemaError(f"the header lists rows of {len(facts.rows)} sums, but the file has {count}.", fix=_BROKEN)
    rows: tuple[Rows, ...] = facts.rows or tuple("kron" for _ in range(count))
    sums = tuple(
        Sum(_factor("kron_a", i, parts, tensors), _factor("kron_b", i, parts, tensors), rows[i]) for i in range(count)
    )
    if facts.weight_shape is None and not sums:
        raise IncompleteError("the layer has neither a sum nor a weight_shape in the header.", fix=_BROKEN)
    weight_shape = facts.weight_shape or sums[0].shape.full
    for i, s in enumerate(sums):
        _check_sum(i, s, weight_shape)
    if MAGNITUDE in parts:
        _check_magnitude(tensors[parts[MAGNITUDE]], weight_shape, facts.magnitude_axis)
    return Layer(sums, weight_shape, parts.get(MAGNITUDE), facts.magnitude_axis)


def _check_name(name: str) -> None:
    component, _, path = name.partition(".")
    if not component or not path or name.startswith(EXTRAS):
        raise SchemaError("a name must have the form <component>.<module path>.", fix=_BROKEN)
    if component.startswith("text_encoder") and path.startswith("text_model."):
        raise SchemaError("a name must not contain `text_model.`.", fix=_BROKEN)


def _factor(part: str, index: int, parts: Parts, tensors: Mapping[str, TensorInfo]) -> Factor:
    """Return the factor A or B of sum `index`: one tensor, or the product up·down."""
    names = {suffix: parts.get(f"{part}{suffix}.{index}") for suffix in ("", "_up", "_down")}
    present = {suffix: name for suffix, name in names.items() if name is not None}
    if present.keys() == {""}:
        return Factor((present[""],), _stack(present[""], tensors))
    if present.keys() != {"_up", "_down"}:
        found = ", ".join(f"{part}{suffix}.{index}" for suffix in present) or "neither"
        raise IncompleteError(
            f"sum {index} needs {part}.{index}, or {part}_up.{index} and {part}_down.{index}; found {found}.",
            fix=_BROKEN,
        )
    (terms, p, r), (other, s, q) = (_stack(present[suffix], tensors) for suffix in ("_up", "_down"))
    if (terms, r) != (other, s):
        raise ShapeError(
            f"{part}_up.{index} is (terms, p, r) = ({terms}, {p}, {r}), {part}_down.{index} is (terms, r, q) = "
            f"({other}, {s}, {q}): terms and r must be equal.",
            fix=_BROKEN,
        )
    return Factor((present["_up"], present["_down"]), (terms, p, q))


def _stack(name: str, tensors: Mapping[str, TensorInfo]) -> tuple[int, int, int]:
    shape = tensors[name].shape
    if len(shape) != 3 or 0 in shape:
        raise ShapeError(f"{quoted(name)} has shape {list(shape)[:8]}, expected (terms, rows, columns).", fix=_BROKEN)
    return shape[0], shape[1], shape[2]


def _check_sum(index: int, s: Sum, weight_shape: tuple[int, ...]) -> None:
    if s.left.shape[0] != s.right.shape[0]:
        raise ShapeError(
            f"sum {index} has {s.left.shape[0]} left factors and {s.right.shape[0]} right factors.", fix=_BROKEN
        )
    expected = weight_shape[0], prod(weight_shape[1:])
    if s.shape.full != expected:
        raise ShapeError(
            f"sum {index} has shape {s.shape}, a delta of {s.shape.full[0]}x{s.shape.full[1]}, but the weight "
            f"{list(weight_shape)} is {expected[0]}x{expected[1]} as a matrix.",
            fix=_BROKEN,
        )


def _check_magnitude(info: TensorInfo, weight_shape: tuple[int, ...], axis: str) -> None:
    length = weight_shape[0 if axis == "out" else 1]
    if info.shape != (length,):
        raise ShapeError(
            f"its magnitude has shape {list(info.shape)[:8]}; on the {axis}put axis it must be [{length}].", fix=_BROKEN
        )
