"""Strict parser of safetensors headers. Torch-free.

Specification: https://github.com/huggingface/safetensors#format — eight bytes of little-endian header size, a
JSON object, then the data, which the tensors must cover without gaps or overlaps. Only the header is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krona_hub.checkpoints import strict_json
from krona_hub.checkpoints.findings import Finding, quoted, raise_first
from krona_hub.checkpoints.os_errors import fault
from krona_hub.checkpoints.sniff import FIRST_BYTES, sniff
from krona_hub.checkpoints.tensor_entries import (
    DTYPE_BITS,
    EIGHT_BITS,
    FLOATS,
    READABLE,
    TensorInfo,
    layout_findings,
    parse_entry,
)
from krona_hub.errors import FormatError, KronaError, StructureError, TruncatedError

__all__ = [
    "DTYPE_BITS", "EIGHT_BITS", "FLOATS", "MAX_HEADER", "READABLE", "Header", "TensorInfo", "examine", "read_header",
]  # fmt: skip

MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation
_AGAIN = "Download or copy it again."
_BROKEN = "Download the file again, or save it again with its application: it is corrupt or forged."


@dataclass(frozen=True)
class Header:
    """Names, dtypes, shapes and offsets of a file's tensors, and its metadata."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int  # bytes from the start of the file
    file_size: int  # bytes


def read_header(path: Path | str) -> Header:
    """Read the header of the safetensors file at `path` and check every rule of the format.

    Reads 8 + n bytes, whatever the size of the file. Raises a FormatError that identifies the file (a pickle, a web
    page, a Git LFS pointer, truncated, …), NotFoundError, or ResourceError if permission is denied.
    """
    header, structural_findings = examine(path)
    raise_first(structural_findings, str(path))
    return header


def examine(path: Path | str) -> tuple[Header, tuple[Finding, ...]]:
    """Return the valid part of the header and a finding for every structural problem.

    Raises the errors of read_header only if the file as a whole is unusable.
    """
    path = Path(path)
    try:
        raw, size = _read(path)
        fields = _parse(raw)
    except (OSError, ValueError) as error:
        raise _as_krona_error(error, path) from None
    metadata, structural_findings = _metadata(fields.pop("__metadata__", {}))
    tensors: dict[str, TensorInfo] = {}
    for name, value in fields.items():
        try:
            tensors[name] = parse_entry(value)
        except KronaError as error:
            structural_findings.append(Finding.of(error, where=quoted(name)))
    if len(tensors) == len(fields):  # an invalid entry leaves a gap, which is not reported again
        structural_findings.extend(layout_findings(tensors, size - 8 - len(raw)))
    return Header(path, tensors, metadata, 8 + len(raw), size), tuple(structural_findings)


def _as_krona_error(error: OSError | ValueError, path: Path) -> KronaError:
    return error.within(str(path)) if isinstance(error, KronaError) else fault(error, path)


def _read(path: Path) -> tuple[bytes, int]:
    """Return the bytes of the header and the size of the file. Raises a FormatError that identifies other files."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):  # never open a pipe or a device: it may block forever
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise FormatError(f"this is {kind}.", fix="Specify the .safetensors file itself.")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(FIRST_BYTES)
        length = int.from_bytes(first[:8], "little")
        _check_start(first, length, size)
        file.seek(8)
        return file.read(length), size


def _check_start(first: bytes, length: int, size: int) -> None:
    """Raise a FormatError unless the file starts like a safetensors file: header size, then `{`."""
    if not first:
        raise TruncatedError("the file is empty.", fix=_AGAIN)
    has_brace = first[8:9] == b"{"
    if has_brace and 8 + length <= size and length <= MAX_HEADER:
        return
    known = None if has_brace and length <= MAX_HEADER else sniff(first)
    if known:
        raise known
    if len(first) < 10:
        raise TruncatedError(f"the file has only {size} bytes.", fix=_AGAIN)
    if has_brace and length > MAX_HEADER:
        raise StructureError(
            f"the header size is {length:,} bytes; {MAX_HEADER:,} is the limit of the format.", fix=_BROKEN
        )
    if has_brace:
        raise TruncatedError(
            f"the file ends inside its header: {8 + length:,} bytes expected, {size:,} found.", fix=_AGAIN
        )
    raise FormatError("this is not a safetensors file.", fix="Specify the .safetensors file of the adapter.")


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        return strict_json.parse(raw)
    except StructureError as error:
        raise StructureError(f"invalid header: {error.cause}", fix=_BROKEN) from None


def _metadata(value: Any) -> tuple[dict[str, str], list[Finding]]:
    """Return the entries whose values are strings, and a finding for each other entry."""
    if not isinstance(value, dict):
        return {}, [Finding.of(StructureError("it is not an object.", fix=_BROKEN), where="__metadata__")]
    odd = [key for key, text in value.items() if not isinstance(text, str)]
    structural_findings = [
        Finding.of(StructureError(f"the value of {quoted(key)} is not a string.", fix=_BROKEN), where="__metadata__")
        for key in odd
    ]
    return {key: text for key, text in value.items() if isinstance(text, str)}, structural_findings


def structural_findings(path: Path | str) -> tuple[Finding, ...]:
    """Return every structural problem of the file, () for a valid file, instead of raising like read_header."""
    try:
        return examine(path)[1]
    except KronaError as error:
        return (Finding.of(error),)
