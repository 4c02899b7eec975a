"""The fields of `krona.header`, version 1.0, and their permitted values. Torch-free.

`schemas/krona-adapter-1.0.json` defines the same for other languages; a test keeps the two consistent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from krona_hub.checkpoints.findings import Finding, quoted
from krona_hub.errors import SchemaError


class FieldKind(NamedTuple):
    """The permitted values of a field."""

    words: str  # "a string", for "must be a string"
    accepts: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_error(value: Any) -> bool:
    """Return whether the value is a relative error: a number from 0 to MAX_ERROR, since JSON integers are unbounded."""
    return type(value) in (int, float) and 0 <= value <= MAX_ERROR


def _list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(accepts, value))


def _is_weight_shape(value: Any) -> bool:
    sizes = _list_of(lambda n: type(n) is int and 1 <= n < 2**31)
    return sizes(value) and 2 <= len(value) <= 5


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text_object(value: Any) -> bool:
    return _is_object(value) and all(map(_is_text, value.values()))


MAX_ERROR = 1e300
OPS = {"linear": 2, "conv1d": 3, "conv2d": 4, "conv3d": 5}  # -> length of weight_shape
ROWS = ("kron", "shuffled")
AXES = ("out", "in")
TEXT = FieldKind("a string", _is_text)
TEXTS = FieldKind("a list of strings", _list_of(_is_text))
OBJECT = FieldKind("an object", _is_object)
SHA256 = FieldKind(
    "64 hexadecimal digits", lambda v: _is_text(v) and len(v) == 64 and not set(v) - set("0123456789abcdef")
)
RELATIVE_ERROR = FieldKind("a nonnegative number", _is_error)

BASE = {"family": TEXT, "hub_id": TEXT, "revision": TEXT, "fingerprint": SHA256, "candidates": TEXTS}
PROVENANCE = {
    "created_by": TEXT,
    "source_format": TEXT,
    "source_sha256": SHA256,
    "method": TEXT,
    "relative_error": RELATIVE_ERROR,
    "layer_errors": FieldKind("a list of nonnegative numbers or null", _list_of(lambda v: v is None or _is_error(v))),
    "metadata": FieldKind("an object with string values", _is_text_object),
}
LAYER = {
    "op": FieldKind(f"one of {', '.join(OPS)}", lambda v: _is_text(v) and v in OPS),
    "weight_shape": FieldKind("a list of 2 to 5 sizes", _is_weight_shape),
    "rows": FieldKind(f"a list of {' or '.join(ROWS)}", _list_of(lambda v: _is_text(v) and v in ROWS)),
    "magnitude_axis": FieldKind("out or in", lambda v: _is_text(v) and v in AXES),
}
TOP = {
    "base": OBJECT,
    "layers": OBJECT,
    "provenance": OBJECT,
    "training": OBJECT,
    "licence": TEXT,
    "trigger_words": TEXTS,
}
_FIX = "See docs/schema-1.0.md for all fields; omit unknown values instead of writing null."


class FieldSplit(NamedTuple):
    """An object of the header, split into known fields, unknown fields and findings."""

    known: dict[str, Any]  # fields of 1.0 with valid values
    unknown: dict[str, Any]  # fields of newer minor versions, to be preserved
    findings: list[Finding]


def split(value: Any, table: Mapping[str, FieldKind], where: str) -> FieldSplit:
    """Split an object by a table of fields; every violation is a finding at `where`.

    >>> split({"family": "sdxl", "hub_id": 3, "new": 1}, BASE, "base")[:2]
    ({'family': 'sdxl'}, {'new': 1})
    """
    if not isinstance(value, dict):
        return FieldSplit({}, {}, [_wrong(where, OBJECT)])
    known = {k: v for k, v in value.items() if k in table and table[k].accepts(v)}
    unknown = {k: v for k, v in value.items() if k not in table}
    findings = [_wrong(f"{where}.{key}", table[key]) for key in value if key in table and key not in known]
    return FieldSplit(known, unknown, findings)


def _wrong(where: str, kind: FieldKind) -> Finding:
    return Finding.of(SchemaError(f"it must be {kind.words}.", fix=_FIX), where=f"krona.header {where.lstrip('.')}")


def op_findings(layers: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Check that each `op` matches the length of its weight_shape, which is 2 if omitted."""
    for name, layer in layers.items():
        if "op" in layer and len(layer.get("weight_shape", (0, 0))) != OPS[layer["op"]]:
            yield Finding.of(
                SchemaError(f"its op {layer['op']} does not match its weight_shape.", fix=_FIX), where=quoted(name)
            )
