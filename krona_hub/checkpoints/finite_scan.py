"""Detection of NaN and infinity by bit patterns, since NumPy has no bfloat16. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from io import BufferedReader
from typing import NamedTuple

from krona_hub.checkpoints.header import Header, TensorInfo
from krona_hub.checkpoints.os_errors import fault

PIECE = 1 << 20  # bytes per step: small enough to stay in the CPU cache


class Exponent(NamedTuple):
    view: str  # NumPy name of the unsigned integer that holds the bits
    mask: int  # NaN and infinity have all of these bits set


_IEEE = {
    "F64": Exponent("<u8", 0x7FF0_0000_0000_0000),
    "F32": Exponent("<u4", 0x7F80_0000),
    "C64": Exponent("<u4", 0x7F80_0000),
    "F16": Exponent("<u2", 0x7C00),
    "BF16": Exponent("<u2", 0x7F80),
    "F8_E5M2": Exponent("|u1", 0x7C),
    "F8_E4M3": Exponent("|u1", 0x7F),  # NaN only: this format has no infinity
}


def scan(header: Header) -> dict[str, int]:
    """Count the NaN and infinite values per tensor, and return the tensors that have any. Reads the file once."""
    suspects = {name: info for name, info in header.tensors.items() if info.dtype in _IEEE and info.numel}
    if not suspects:
        return {}
    buffer = memoryview(bytearray(PIECE))
    try:
        with header.path.open("rb") as file:
            counts = {n: _count_in(file, header.data_start, info, buffer) for n, info in suspects.items()}
    except OSError as error:
        raise fault(error, header.path) from None
    return {name: count for name, count in counts.items() if count}


def _count_in(file: BufferedReader, data_start: int, info: TensorInfo, buffer: memoryview) -> int:
    """Count the NaN and infinite values of one tensor."""
    exponent = _IEEE[info.dtype]
    return sum(
        _count(piece, exponent) for piece in _pieces(file, data_start + info.start, info.end - info.start, buffer)
    )


def _pieces(file: BufferedReader, start: int, left: int, buffer: memoryview) -> Iterator[memoryview]:
    """Read bytes of a file through one buffer; a memory map would eventually hold the whole file in memory."""
    file.seek(start)
    while left:
        piece = buffer[: min(left, len(buffer))]
        if file.readinto(piece) < len(piece):
            raise OSError("the file was truncated while it was being read")
        yield piece
        left -= len(piece)


def _count(raw: memoryview, exponent: Exponent) -> int:
    """Count the NaN and infinite values in some bytes."""
    import numpy as np

    exponents = np.frombuffer(raw, exponent.view) & exponent.mask
    return 0 if int(exponents.max()) < exponent.mask else int((exponents == exponent.mask).sum())
