"""The file of moments: one safetensors file, version 1.0.

Tensors `<layer>.inputs` and `<layer>.outputs`, (r, r) float64 (`krona_hub.adapters.moments`). Metadata: `format` = pt,
`krona.moments` = 1.0, `krona.header` = JSON with the digest of the adapter and the record of how they were gathered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from krona_hub.adapters.moments import LayerMoments, Moments
from krona_hub.checkpoints.header import Header, read_header
from krona_hub.checkpoints.reader import load
from krona_hub.checkpoints.strict_json import parse
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.errors import NonFiniteError, SchemaError, StructureError

VERSION = "1.0"
VERSION_KEY, HEADER_KEY = "krona.moments", "krona.header"
PARTS = ("inputs", "outputs")


def write_moments(moments: Moments, path: str | Path, *, overwrite: bool = False) -> None:
    """Write moments atomically; equal moments give equal bytes. Raises what `write_tensors` raises."""
    tensors = {f"{name}.{part}": getattr(layer, part) for name, layer in moments.layers.items() for part in PARTS}
    header = {"adapter": moments.adapter, "record": moments.record}
    metadata = {
        "format": "pt",
        VERSION_KEY: VERSION,
        HEADER_KEY: json.dumps(header, ensure_ascii=False, sort_keys=True),
    }
    write_tensors(path, tensors, metadata, overwrite=overwrite)


def read_moments(path: str | Path) -> Moments:
    """Read moments.

    Raises SchemaError for a file without moments or of a newer major version, StructureError for a damaged one,
    NonFiniteError for NaN or infinite values.
    """
    header = read_header(path)
    fields = _fields(header)
    if len(header.tensors) % len(PARTS):
        raise StructureError(f"{path} lacks moments of a layer.", fix="Gather them again with krona calibrate.")
    tensors = load(header)
    layers: dict[str, LayerMoments] = {}
    for key in tensors:
        name, _, part = key.rpartition(".")
        if part not in PARTS or any(f"{name}.{each}" not in tensors for each in PARTS):
            raise StructureError(f"{path} has an unknown tensor {key!r}.", fix="Gather the moments again.")
        layers[name] = LayerMoments(tensors[f"{name}.inputs"].double(), tensors[f"{name}.outputs"].double())
    _check_values(layers, path)
    return Moments(layers, str(fields["adapter"]), fields["record"])


def _fields(header: Header) -> dict[str, Any]:
    version = header.metadata.get(VERSION_KEY)
    if version is None:
        raise SchemaError(
            f"{header.path} contains no moments.", fix="Specify a file that krona calibrate wrote, with --moments."
        )
    if version.partition(".")[0] != VERSION.partition(".")[0]:
        raise SchemaError(f"{header.path} has moments of version {version}.", fix="Update krona-hub.")
    try:
        fields = parse(header.metadata.get(HEADER_KEY, ""))
    except StructureError as error:
        raise StructureError(f"{header.path}: {error.cause}", fix="Gather the moments again.") from None
    if not isinstance(fields.get("adapter"), str) or not isinstance(fields.get("record"), dict):
        raise StructureError(f"{header.path} lacks the digest of its adapter.", fix="Gather the moments again.")
    return fields


def _check_values(layers: dict[str, LayerMoments], path: str | Path) -> None:
    for name, layer in layers.items():
        for part in PARTS:
            tensor = getattr(layer, part)
            if tensor.dim() != 2 or tensor.shape[0] != tensor.shape[1] or tensor.shape != layer.inputs.shape:
                raise StructureError(
                    f"{path}: {name}.{part} has shape {tuple(tensor.shape)}, not that of a square matrix.",
                    fix="Gather the moments again.",
                )
            if not bool(tensor.isfinite().all()):
                raise NonFiniteError(
                    f"{path}: {name}.{part} contains NaN or infinity.", fix="Gather the moments again."
                )
