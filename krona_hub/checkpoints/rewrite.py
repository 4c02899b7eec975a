"""A safetensors file written anew with some tensors changed: one pass, any size, little memory. Torch-free.

The old file is mapped, so that its pages belong to the system; the new one is written at offsets that are known
before, so that threads do tensors and stretches of untouched bytes side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from krona_hub.checkpoints.header import Header
from krona_hub.checkpoints.workers import Progress

ByteSink = Callable[[int, memoryview], None]  # (byte offset inside the tensor, bytes)


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor; its shape stays."""

    info_dtype: str  # the dtype it has in the output, as in the header: F16, F32, …
    produce: Callable[[memoryview, ByteSink], None]
    """Gets the old bytes (mapped, read-only, valid until it returns) and sends every byte of the new tensor once.

    Called on any thread; the sink may be called from that thread only, and raises when the work is to stop.
    """


def rewrite(
    header: Header,
    out: BinaryIO | Path,
    changes: Mapping[str, Change],
    *,
    metadata: Mapping[str, str],
    data_hash: str | None = None,
    threads: int = 2,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> None:
    """Write the file of `header` to `out` with `changes` made and with `metadata` in place of its own.

    Tensors keep their order (unless a wider dtype would leave one misaligned) and untouched ones their bytes. `out`
    is a path, which then appears whole by rename, or a file open for writing, which the caller makes so.
    `data_hash` names a metadata key that receives `0x` + the sha256 of all bytes after the header. `progress` gets
    the bytes written since its last call, `new_size` in sum.

    Raises IncompleteError for a change of a tensor that is not there, IntegrityError where a `produce` sends too few
    or too many bytes, ResourceError for a full disk; the error of a `produce` comes out as it is.
    """


def new_size(
    header: Header, dtypes: Mapping[str, str], *, metadata: Mapping[str, str], data_hash: str | None = None
) -> int:
    """The bytes that the rewritten file will have, where the tensors of `dtypes` get those dtypes."""
    raise NotImplementedError


def check_space(folder: Path, needed: int) -> None:
    """Raise ResourceError, with how much is missing, where `folder`'s disk has less than `needed` bytes free."""
