"""Where everything lies in a file that is written anew with other dtypes or metadata. Torch-free."""

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
    """The new file, known before any of it is made."""

    old: Header
    tensors: Mapping[str, TensorInfo]  # in the order in which they lie
    metadata: Mapping[str, str]
    data_hash: str | None  # the metadata key that gets the sha256 of the data

    @classmethod
    def of(
        cls, old: Header, dtypes: Mapping[str, str], metadata: Mapping[str, str], data_hash: str | None = None
    ) -> FileLayout:
        """The layout in which the tensors of `dtypes` have those. Raises IncompleteError for one that is not there."""
        for name in dtypes.keys() - old.tensors.keys():
            raise IncompleteError(f"{old.path}: there is no tensor {quoted(name)}.", fix="Is this the right file?")
        return cls(old, _placed(old.tensors, dtypes), metadata, data_hash)

    def opening(self, digest: str = _NO_HASH) -> bytes:
        """The header and its size, of one length whatever the digest."""
        hashed = {self.data_hash: digest} if self.data_hash else {}
        order = [(name, EncodedTensor(info.dtype, info.shape, tuple)) for name, info in self.tensors.items()]
        return _padded(header_bytes(order, {**self.metadata, **hashed}), self.old.data_start)

    @property
    def data_size(self) -> int:
        """Bytes after the header."""
        return max((info.end for info in self.tensors.values()), default=0)


def new_size(
    header: Header, dtypes: Mapping[str, str], *, metadata: Mapping[str, str], data_hash: str | None = None
) -> int:
    """The bytes of the file that `rewrite` will write, where the tensors of `dtypes` get those dtypes."""
    layout = FileLayout.of(header, dtypes, metadata, data_hash)
    return len(layout.opening()) + layout.data_size


def _padded(opening: bytes, data_start: int) -> bytes:
    """With spaces after the header, so that the data lies in its pages as it did in the old file.

    Whole pages are copied in half the time of halves, and file systems that can share blocks share them.
    """
    spaces = (data_start - len(opening)) % PAGE
    if spaces % ALIGNMENT:  # the old data is not aligned, the new is
        return opening
    return (len(opening) - 8 + spaces).to_bytes(8, "little") + opening[8:] + b" " * spaces


def _placed(old: Mapping[str, TensorInfo], dtypes: Mapping[str, str]) -> dict[str, TensorInfo]:
    """The tensors with their new dtypes and places, in the order of the file.

    By falling width where a wider dtype would leave one misaligned that was not: some readers refuse that.
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
