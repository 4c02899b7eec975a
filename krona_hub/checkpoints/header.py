"""The header of a safetensors file, parsed by hand and strictly. Torch-free.

Specification: https://github.com/huggingface/safetensors#format — eight bytes of little-endian header size, a
JSON object, then the data, which the tensors must cover without holes or overlaps. Only the header is read.
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
from krona_hub.checkpoints.tensor_entries import DTYPE_BITS, FLOATS, TensorInfo, layout_findings, parse_entry
from krona_hub.errors import FormatError, KronaError, StructureError, TruncatedError

__all__ = ["DTYPE_BITS", "FLOATS", "MAX_HEADER", "Header", "TensorInfo", "examine", "read_header"]

MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation
_AGAIN = "Download or copy it again."
_BROKEN = "The file is broken or forged: download it again, or save it again with its own tool."


@dataclass(frozen=True)
class Header:
    """Names, types, shapes and places of a file's tensors, and its metadata."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int  # bytes from the start of the file
    file_size: int  # bytes


def read_header(path: Path | str) -> Header:
    """The header of the safetensors file at `path`, every rule of the format checked.

    Reads 8 + n bytes, whatever the size of the file. Raises a FormatError that says what the file really is
    (a pickle, a web page, a git-lfs pointer, truncated, …), NotFoundError, or ResourceError without permission.
    """
    header, structural_findings = examine(path)
    raise_first(structural_findings, str(path))
    return header


def examine(path: Path | str) -> tuple[Header, tuple[Finding, ...]]:
    """The sound part of the header, and all that is wrong with the rest.

    Raises, as read_header, only where nothing can be made of the file as a whole.
    """
    path = Path(path)
    try:
        raw, size = _read(path)
        fields = _parse(raw)
    except (OSError, ValueError) as error:
        raise _told(error, path) from None
    metadata, structural_findings = _metadata(fields.pop("__metadata__", {}))
    tensors: dict[str, TensorInfo] = {}
    for name, value in fields.items():
        try:
            tensors[name] = parse_entry(value)
        except KronaError as error:
            structural_findings.append(Finding.of(error, where=quoted(name)))
    if len(tensors) == len(fields):  # holes beside a broken entry are its own
        structural_findings.extend(layout_findings(tensors, size - 8 - len(raw)))
    return Header(path, tensors, metadata, 8 + len(raw), size), tuple(structural_findings)


def _told(error: OSError | ValueError, path: Path) -> KronaError:
    return error.within(str(path)) if isinstance(error, KronaError) else fault(error, path)


def _read(path: Path) -> tuple[bytes, int]:
    """The bytes of the header, and the size of the file. Raises a FormatError that says what the file is."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):  # never open a pipe or a device: it may block for ever
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise FormatError(f"this is {kind}.", fix="Give the .safetensors file itself.")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(FIRST_BYTES)
        length = int.from_bytes(first[:8], "little")
        _check_start(first, length, size)
        file.seek(8)
        return file.read(length), size


def _check_start(first: bytes, length: int, size: int) -> None:
    """Raise unless the first bytes can open a safetensors file: header size, then `{`."""
    if not first:
        raise TruncatedError("the file is empty.", fix=_AGAIN)
    opens = first[8:9] == b"{"
    if opens and 8 + length <= size and length <= MAX_HEADER:
        return
    known = None if opens and length <= MAX_HEADER else sniff(first)
    if known:
        raise known
    if len(first) < 10:
        raise TruncatedError(f"the file has only {size} bytes.", fix=_AGAIN)
    if opens and length > MAX_HEADER:
        raise StructureError(
            f"it claims a header of {length:,} bytes; {MAX_HEADER:,} is the limit of the format.", fix=_BROKEN
        )
    if opens:
        raise TruncatedError(
            f"the file ends inside its header: {8 + length:,} bytes are needed, {size:,} are there.", fix=_AGAIN
        )
    raise FormatError("this is no safetensors file.", fix="Give the .safetensors file of the adapter.")


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        return strict_json.parse(raw)
    except StructureError as error:
        raise StructureError(f"the header is broken: {error.cause}", fix=_BROKEN) from None


def _metadata(value: Any) -> tuple[dict[str, str], list[Finding]]:
    """The entries that are text, and a finding for each that is not."""
    if not isinstance(value, dict):
        return {}, [Finding.of(StructureError("it is not an object.", fix=_BROKEN), where="__metadata__")]
    odd = [key for key, text in value.items() if not isinstance(text, str)]
    structural_findings = [
        Finding.of(StructureError(f"the value of {quoted(key)} is not text.", fix=_BROKEN), where="__metadata__")
        for key in odd
    ]
    return {key: text for key, text in value.items() if isinstance(text, str)}, structural_findings


def structural_findings(path: Path | str) -> tuple[Finding, ...]:
    """Every structural problem of the file; () for a sound one. Raises nothing that read_header would raise."""
    try:
        return examine(path)[1]
    except KronaError as error:
        return (Finding.of(error),)
