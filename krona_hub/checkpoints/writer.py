"""Atomic, deterministic writer of safetensors files: equal content gives equal bytes on every machine.

It writes its own header, because the order of the metadata in the reference writer changes from run to run. Tensors
are sorted by descending dtype width and then by name, so that all of them are aligned, and the data starts at a
multiple of eight bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from krona_hub.checkpoints.atomic import atomic_file
from krona_hub.checkpoints.findings import quoted
from krona_hub.checkpoints.header import MAX_HEADER, Header
from krona_hub.checkpoints.tensor_entries import DTYPE_BITS
from krona_hub.errors import DtypeError, ResourceError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 8  # bytes
DTYPE_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip  # torch dtype -> dtype in the header
CHUNK = 1 << 24  # bytes per copy


class EncodedTensor(NamedTuple):
    """A tensor to be written; its bytes are produced on demand."""

    dtype: str  # as in the header: F32, BF16, …
    shape: tuple[int, ...]
    data: Callable[[], Iterable[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        bits = DTYPE_BITS[self.dtype]
        for size in self.shape:
            bits *= size
        return bits // 8


def write_tensors(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a safetensors file atomically; equal input gives equal bytes.

    Raises ConflictError if `path` exists and `overwrite` is false, NotFoundError if its folder does not exist,
    ResourceError if the disk is full or not writable, DtypeError for a dtype that the format does not support.
    """
    write_stored(path, {name: _stored(name, t) for name, t in tensors.items()}, metadata, overwrite=overwrite)


def write_stored(
    path: Path | str,
    tensors: Mapping[str, EncodedTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Like write_tensors, but from bytes, with one tensor in memory at a time. Torch-free."""
    order = sorted(tensors.items(), key=lambda item: (-DTYPE_BITS[item[1].dtype], item[0]))
    opening = header_bytes(order, metadata or {})
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(opening)
        for _, tensor in order:
            for piece in tensor.data():
                file.write(piece)


def header_bytes(order: Iterable[tuple[str, EncodedTensor]], metadata: Mapping[str, str]) -> bytes:
    """Return the header size and the JSON header of tensors in the given order, padded with spaces."""
    fields: dict[str, object] = {}
    if metadata:
        fields["__metadata__"] = {key: _text(key, metadata[key]) for key in sorted(metadata)}
    start = 0
    for name, tensor in order:
        end = start + tensor.nbytes
        fields[_name(name)] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
        start = end
    text = _encoded(fields)
    text += b" " * (-len(text) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise ResourceError(
            f"the header would be {len(text):,} bytes; {MAX_HEADER:,} is the limit of the format.",
            fix="Shorten the metadata.",
        )
    return len(text).to_bytes(8, "little") + text


def copied(header: Header) -> dict[str, EncodedTensor]:
    """Return the tensors of a file unchanged, for a file with another header. Torch-free."""

    def reading(start: int, end: int) -> Callable[[], Iterable[bytes]]:
        return lambda: _slices(header.path, header.data_start + start, header.data_start + end)

    return {name: EncodedTensor(i.dtype, i.shape, reading(i.start, i.end)) for name, i in header.tensors.items()}


def _slices(path: Path, start: int, end: int) -> Iterable[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            piece = file.read(min(CHUNK, end - start))
            if not piece:
                raise ResourceError(f"{str(path)!r} was truncated while it was being read.", fix="Try again.")
            start += len(piece)
            yield piece


def _encoded(fields: Mapping[str, object]) -> bytes:
    try:
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError("a tensor name or a metadata value contains a lone surrogate.", fix="Remove it.") from None


def _name(name: str) -> str:
    if name == "__metadata__":
        raise UsageError("a tensor cannot be named '__metadata__'.", fix="Rename it.")
    return name


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise UsageError(
            f"the metadata value of {quoted(key)} must be a string.", fix="Pass json.dumps(value) or str(value)."
        )
    return value


def _stored(name: str, tensor: Tensor) -> EncodedTensor:
    """Encode a torch tensor; its bytes are produced on demand."""
    import torch

    dtype = DTYPE_NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout != torch.strided or tensor.is_meta:
        raise DtypeError(
            f"{quoted(name)} is a {tensor.dtype} tensor of layout {tensor.layout} on {tensor.device}, which "
            "safetensors cannot store.",
            fix="Write dense F32, F16 or BF16 tensors.",
        )

    def data() -> Iterable[memoryview]:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return [memoryview(flat.view(torch.uint8).numpy())] if flat.numel() else []  # type: ignore[arg-type]

    return EncodedTensor(dtype, tuple(tensor.shape), data)
