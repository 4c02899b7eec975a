"""Entries of a safetensors header: dtypes, shapes and offsets, and their validation. Torch-free.

The data section must be covered by the tensors without gaps, overlaps or trailing bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

from krona_hub.checkpoints.findings import Finding, quoted
from krona_hub.errors import DtypeError, KronaError, StructureError, TruncatedError

DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")  # plain casts, exact in BF16
READABLE = (*FLOATS, *EIGHT_BITS)
MAX_BYTES = 2**63 - 1  # largest offset
_FIELDS = {"dtype", "shape", "data_offsets"}
_BROKEN = "Download the file again, or save it again with its application: it is corrupt or forged."


class TensorInfo(NamedTuple):
    """The header entry of one tensor."""

    dtype: str  # as in the header: F32, BF16, …
    shape: tuple[int, ...]
    start: int  # offset in bytes from the start of the data section
    end: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def parse_entry(value: Any) -> TensorInfo:
    """Parse one entry of the header. Raises StructureError or DtypeError without the tensor name."""
    if not isinstance(value, dict):
        raise StructureError("its entry is not an object.", fix=_BROKEN)
    if value.keys() != _FIELDS:
        odd = sorted(value.keys() ^ _FIELDS)
        raise StructureError(f"its entry has a missing or unknown field {quoted(odd[0])}.", fix=_BROKEN)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise DtypeError(
            f"unknown dtype {quoted(dtype, 40)}.",
            fix="Save it again as F32, F16 or BF16 with the application that wrote it.",
        )
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise StructureError("its shape or its offsets are not lists of sizes.", fix=_BROKEN)
    info = TensorInfo(dtype, tuple(shape), *offsets)
    _check_length(info)
    return info


def _sizes(value: Any) -> bool:
    """Return whether the value is a list of integers that fit in an offset; True and 1.0 do not count."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_BYTES for n in value)


def _check_length(info: TensorInfo) -> None:
    bits = info.numel * DTYPE_BITS[info.dtype]
    if bits % 8 or bits // 8 != info.end - info.start:
        raise StructureError(
            f"{info.dtype} {list(info.shape)[:8]} takes {bits / 8 if bits % 8 else bits // 8} bytes, "
            f"but its offsets span {info.end - info.start}.",
            fix=_BROKEN,
        )


def layout_findings(tensors: Mapping[str, TensorInfo], data_size: int) -> Iterator[Finding]:
    """Yield a finding for every gap, overlap and overrun in a data section of `data_size` bytes."""
    reached = 0
    sound = True
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != reached:
            sound = False
            yield _misplaced(name, info, reached)
        reached = max(reached, info.end)
    if reached > data_size:
        yield Finding.of(_short(reached, data_size) if sound else _overflow(reached, data_size))
    elif reached < data_size:
        yield Finding.of(
            StructureError(f"{data_size - reached:,} bytes follow the last tensor.", fix=_BROKEN),
        )


def _misplaced(name: str, info: TensorInfo, reached: int) -> Finding:
    cause = (
        f"its data overlaps the previous tensor by {reached - info.start:,} bytes."
        if info.start < reached
        else f"there is a gap of {info.start - reached:,} bytes before its data."
    )
    return Finding.of(StructureError(cause, fix=_BROKEN), where=quoted(name))


def _short(declared: int, found: int) -> KronaError:
    return TruncatedError(
        f"the file is truncated: its header declares {declared:,} bytes of data, {found:,} found.",
        fix="Download or copy it again.",
    )


def _overflow(declared: int, found: int) -> KronaError:
    return StructureError(f"the tensors extend {declared - found:,} bytes beyond the end of the file.", fix=_BROKEN)
