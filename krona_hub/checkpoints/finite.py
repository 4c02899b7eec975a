"""Finding NaN and infinity by their bits, over a memory map: numpy knows no bfloat16. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from krona_hub.checkpoints.faults import fault
from krona_hub.checkpoints.header import Header, TensorInfo

if TYPE_CHECKING:
    import numpy as np

CHUNK = 1 << 20  # numbers looked at in one go: small enough to stay in the cache


class Exponent(NamedTuple):
    view: str  # numpy's name of the unsigned integer that holds the bits
    mask: int  # NaN and infinity have all of these bits set


_IEEE = {
    "F64": Exponent("<u8", 0x7FF0_0000_0000_0000),
    "F32": Exponent("<u4", 0x7F80_0000),
    "C64": Exponent("<u4", 0x7F80_0000),
    "F16": Exponent("<u2", 0x7C00),
    "BF16": Exponent("<u2", 0x7F80),
    "F8_E5M2": Exponent("|u1", 0x7C),
    "F8_E4M3": Exponent("|u1", 0x7F),  # only NaN: this format has no infinity
}


def scan(header: Header) -> dict[str, int]:
    """The tensors that hold NaN or infinity -> how many such numbers; integers cannot. Reads the file once."""
    import numpy as np

    suspects = {name: info for name, info in header.tensors.items() if info.dtype in _IEEE and info.numel}
    if not suspects:
        return {}
    try:
        data = np.memmap(header.path, dtype=np.uint8, mode="r", offset=header.data_start)
    except (OSError, ValueError) as error:
        raise fault(error, header.path) from None
    counts = {name: count_non_finite(data[info.start : info.end], info) for name, info in suspects.items()}
    return {name: count for name, count in counts.items() if count}


def count_non_finite(raw: np.ndarray[Any, Any], info: TensorInfo) -> int:
    """How many of the numbers in the bytes `raw` are NaN or infinite."""
    view, mask = _IEEE[info.dtype]
    return sum(_count(bits & mask, mask) for bits in _chunks(raw.view(view)))


def _chunks(bits: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    return (bits[i : i + CHUNK] for i in range(0, len(bits), CHUNK))


def _count(exponents: np.ndarray[Any, Any], mask: int) -> int:
    return 0 if int(exponents.max()) < mask else int((exponents == mask).sum())
