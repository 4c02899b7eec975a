"""Tensors of a file, read as they are needed."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, BinaryIO

from krona_hub.checkpoints.findings import quoted
from krona_hub.checkpoints.header import Header, TensorInfo
from krona_hub.checkpoints.os_errors import fault
from krona_hub.errors import DtypeError, IncompleteError, ShapeError, StructureError

if TYPE_CHECKING:
    from torch import Tensor

_SCALARS = {
    "F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f",
    "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B", "BOOL": "<?",
}  # fmt: skip


def load(header: Header, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The named tensors, or all, in the order of their names; mapped from the file, so that reading is lazy.

    Raises IncompleteError for a name that the file does not have.
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
    except SafetensorError as error:  # the header was sound when we read it
        raise StructureError(
            f"{header.path}: safetensors refuses the file ({error}).", fix="Did it change meanwhile? Try again."
        ) from None


def read_scalars(header: Header, names: Iterable[str]) -> dict[str, float]:
    """The values of tensors of one number each, such as alpha, without torch.

    Raises ShapeError for a tensor of several numbers, DtypeError for a type that holds no plain number.
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
        raise ShapeError(f"{where} should be one number but is {list(info.shape)}.", fix="Save the adapter again.")
    if info.dtype not in _SCALARS:
        raise DtypeError(f"{where} is {info.dtype}, which is no plain number.", fix="Save it again as F32.")
    file.seek(header.data_start + info.start)
    raw = file.read(info.nbytes)
    if len(raw) < info.nbytes:
        raise StructureError(f"{where} cannot be read: the file changed meanwhile.", fix="Try again.")
    if info.dtype == "BF16":  # the upper half of a float32
        raw = b"\0\0" + raw
    return float(struct.unpack(_SCALARS[info.dtype], raw)[0])


def _info(header: Header, name: str) -> TensorInfo:
    if name not in header.tensors:
        raise IncompleteError(f"{header.path}: there is no tensor {quoted(name)}.", fix="Is this the right file?")
    return header.tensors[name]
