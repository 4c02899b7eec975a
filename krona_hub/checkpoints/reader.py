"""Reading tensors from a safetensors file on demand."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from math import ldexp, nan
from typing import TYPE_CHECKING, BinaryIO

from krona_hub.checkpoints.findings import quoted
from krona_hub.checkpoints.header import Header, TensorInfo
from krona_hub.checkpoints.os_errors import fault
from krona_hub.errors import DtypeError, IncompleteError, ShapeError, StructureError

if TYPE_CHECKING:
    from torch import Tensor

_SCALARS = {
    "F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f",
    "F8_E5M2": "<e", "F8_E4M3": "<e",
    "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B", "BOOL": "<?",
}  # fmt: skip


def load(header: Header, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Load the named tensors, or all, sorted by name; memory-mapped, so reading is lazy.

    Raises IncompleteError for a name that is not in the file.
    """
    from safetensors import SafetensorError, safe_open

    wanted = sorted(header.tensors if names is None else names)
    for name in wanted:
        _info(header, name)
    try:
        with safe_open(str(header.path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in wanted}
    except OSError as error:
        raise fault(error, header.path) from None
    except SafetensorError as error:  # the header was valid when we read it
        raise StructureError(
            f"{header.path}: safetensors cannot read the file ({error}).", fix="It may have changed: try again."
        ) from None


def read_scalars(header: Header, names: Iterable[str]) -> dict[str, float]:
    """Read tensors that contain one value each, such as alpha, without torch.

    Raises ShapeError for a tensor with several values, DtypeError for an unsupported dtype.
    """
    wanted = {name: _info(header, name) for name in names}
    if not wanted:
        return {}
    try:
        with header.path.open("rb") as file:
            return {name: _scalar(file, header, name, info) for name, info in wanted.items()}
    except OSError as error:
        raise fault(error, header.path) from None


def _scalar(file: BinaryIO, header: Header, name: str, info: TensorInfo) -> float:
    where = f"{header.path}: {quoted(name)}"
    if info.numel != 1:
        raise ShapeError(
            f"{where} has shape {list(info.shape)}, expected a single value.", fix="Save the adapter again."
        )
    if info.dtype not in _SCALARS:
        raise DtypeError(f"{where} has the unsupported dtype {info.dtype}.", fix="Save it again as F32.")
    file.seek(header.data_start + info.start)
    raw = file.read(info.nbytes)
    if len(raw) < info.nbytes:
        raise StructureError(f"{where} cannot be read: the file has changed.", fix="Try again.")
    if info.dtype == "BF16":  # the upper half of a float32
        raw = b"\0\0" + raw
    elif info.dtype == "F8_E5M2":  # the upper half of a float16
        raw = b"\0" + raw
    elif info.dtype == "F8_E4M3":
        return _of_e4m3(raw[0])
    return float(struct.unpack(_SCALARS[info.dtype], raw)[0])


def _of_e4m3(byte: int) -> float:
    """The number of an F8_E4M3: sign, four bits of exponent with bias 7, three of mantissa; no infinity."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return nan
    return sign * (ldexp(8 + mantissa, exponent - 10) if exponent else ldexp(mantissa, -9))


def _info(header: Header, name: str) -> TensorInfo:
    if name not in header.tensors:
        raise IncompleteError(
            f"{header.path}: tensor {quoted(name)} not found.", fix="Check that this is the right file."
        )
    return header.tensors[name]
