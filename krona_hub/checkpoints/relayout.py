"""Offsets in a file that is rewritten with other dtypes or metadata. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from krona_hub.checkpoints.findings import quoted
from krona_hub.checkpoints.header import Header
from krona_hub.checkpoints.tensor_entries import DTYPE_BITS, TensorInfo
from krona_hub.checkpoints.writer import ALIGNMENT, EncodedTensor, header_bytes
from krona_hub.errors import IncompleteError

PAGE = 4096  # bytes of a page, and of a block of most file systems
_NO_HASH = "0x" + 64 * "0"


@dataclass(frozen=True)
class FileLayout:
    """The layout of the new file, computed before it is written."""

    old: Header
    tensors: Mapping[str, TensorInfo]  # in the order of their offsets
    metadata: Mapping[str, str]
    data_hash: str | None  # the metadata key that receives the sha256 of the data

    @classmethod
    def of(
        cls, old: Header, dtypes: Mapping[str, str], metadata: Mapping[str, str], data_hash: str | None = None
    ) -> FileLayout:
        """Compute the layout; `dtypes` changes some tensors. Raises IncompleteError for a missing tensor."""
        for name in dtypes.keys() - old.tensors.keys():
            raise IncompleteError(
                f"{old.path}: tensor {quoted(name)} not found.", fix="Check that this is the right file."
            )
        return cls(old, _placed(old.tensors, dtypes), metadata, data_hash)

    def opening(self, digest: str = _NO_HASH) -> bytes:
        """Return the header size and the header; their length does not depend on the digest."""
        hashed = {self.data_hash: digest} if self.data_hash else {}
        order = [(name, EncodedTensor(info.dtype, info.shape, tuple)) for name, info in self.tensors.items()]
        return _padded(header_bytes(order, {**self.metadata, **hashed}), self.old.data_start)

    @property
    def data_size(self) -> int:
        """Size of the data section in bytes."""
        return max((info.end for info in self.tensors.values()), default=0)


def new_size(
    header: Header, dtypes: Mapping[str, str], *, metadata: Mapping[str, str], data_hash: str | None = None
) -> int:
    """Return the size in bytes of the file that `rewrite` writes with new `dtypes` for some tensors."""
    layout = FileLayout.of(header, dtypes, metadata, data_hash)
    return len(layout.opening()) + layout.data_size


def _padded(opening: bytes, data_start: int) -> bytes:
    """Pad the header with spaces, so that the data keeps its position within pages of the old file.

    Whole pages are copied in half the time, and file systems that support block sharing can share them.
    """
    spaces = (data_start - len(opening)) % PAGE
    if spaces % ALIGNMENT:  # the old data is not aligned, the new data is
        return opening
    return (len(opening) - 8 + spaces).to_bytes(8, "little") + opening[8:] + b" " * spaces


def _placed(old: Mapping[str, TensorInfo], dtypes: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Return the tensors with their new dtypes and offsets, in file order.

    Sorts them by descending dtype width if a wider dtype would misalign a tensor that was aligned: some readers reject
    misaligned tensors.
    """
    order = sorted(old, key=lambda name: (old[name].start, old[name].end))
    changed = {name: old[name]._replace(dtype=dtypes.get(name, old[name].dtype)) for name in order}
    tensors = _in_order(changed)
    if any(_aligned(old[name]) and not _aligned(info) for name, info in tensors.items()):
        order.sort(key=lambda name: -DTYPE_BITS[changed[name].dtype])
        tensors = _in_order({name: changed[name] for name in order})
    return tensors


def _in_order(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    placed, start = {}, 0
    for name, info in tensors.items():
        end = start + info.numel * DTYPE_BITS[info.dtype] // 8
        placed[name] = info._replace(start=start, end=end)
        start = end
    return placed


def _aligned(info: TensorInfo) -> bool:
    return 8 * info.start % DTYPE_BITS[info.dtype] == 0
