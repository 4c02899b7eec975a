"""The header of a safetensors file, parsed by hand and strictly. Torch-free.

Specification: https://github.com/huggingface/safetensors#format — eight bytes of little-endian header size, a
JSON object, then the data, which the tensors must cover without holes or overlaps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation


class TensorInfo(NamedTuple):
    dtype: str  # as in the header: F32, BF16, …
    shape: tuple[int, ...]
    start: int  # bytes from the start of the data section
    end: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """Names, types, shapes and places of a file's tensors, and its metadata."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int  # bytes from the start of the file
    file_size: int  # bytes


def read_header(path: Path | str) -> Header:
    """Parse the header of `path`. Raises a FormatError that says what the file really is."""
    path = Path(path)
    raw = path.read_bytes()[: 8 + MAX_HEADER]
    size = int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8 : 8 + size])
    metadata = fields.pop("__metadata__", {})
    tensors = {k: TensorInfo(v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for k, v in fields.items()}
    return Header(path, tensors, metadata, 8 + size, path.stat().st_size)
