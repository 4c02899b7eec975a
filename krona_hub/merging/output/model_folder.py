"""The files of a model folder: which there are, which a merge would leave stale, and copies of the rest. Torch-free."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from krona_hub.bases.weight_files import indices_of
from krona_hub.checkpoints.byte_ranges import Range
from krona_hub.checkpoints.file_names import OTHER_WEIGHTS
from krona_hub.checkpoints.os_errors import fault
from krona_hub.checkpoints.parallel_write import copied, fill, open_source
from krona_hub.checkpoints.temporary_files import is_temporary
from krona_hub.checkpoints.workers import ByteCounter
from krona_hub.errors import ConflictError, FormatError, NotFoundError
from krona_hub.merging.output.destination import Output

CACHES = (".git", ".cache")  # a clone's history and the Hub client's records: as large as the model, and not of it
INDEX = re.compile(r"\.index(\.[^.]+)?\.json$")  # of the plain weights, or of a variant


def files_below(folder: Path) -> list[Path]:
    """The files of a folder and its subfolders, relative, sorted.

    Links are followed, leftovers of killed writers passed over. Raises NotFoundError for a link that leads nowhere,
    ConflictError for a pipe, a device or links in a circle.
    """
    return sorted(path.relative_to(folder) for path in _walk(folder, (folder.resolve(),)))


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    try:
        children = sorted(folder.iterdir())
    except OSError as error:
        raise fault(error, folder) from None
    for child in children:
        if is_temporary(child.name):
            continue
        if not child.exists():
            raise NotFoundError(f"the link {str(child)!r} leads nowhere.", fix="Download the folder again.")
        if child.is_dir():
            yield from _walk_into(child, above)
        elif stat.S_ISREG(child.stat().st_mode):
            yield child
        else:
            raise ConflictError(f"{str(child)!r} is neither a file nor a folder.", fix="Move it away.")


def _walk_into(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        raise ConflictError(f"{str(folder)!r} is a link to a folder that it lies in.", fix="Remove the link.")
    if folder.name not in CACHES:
        yield from _walk(folder, (*above, real))


def stale(files: Iterable[Path], changed: Collection[Path]) -> list[Path]:
    """The files that hold the weights of a changed component in another form, with their indices: not merged.

    >>> names = ["unet/a.safetensors", "unet/a.bin", "unet/a.bin.index.json", "vae/b.bin"]
    >>> [p.name for p in stale(map(Path, names), {Path("unet/a.safetensors")})]
    ['a.bin', 'a.bin.index.json']
    """
    folders = {path.parent for path in changed}
    return [path for path in files if path.parent in folders and INDEX.sub("", path.name).endswith(OTHER_WEIGHTS)]


def indices(base: Path, growth: Mapping[Path, int]) -> dict[Path, bytes]:
    """The index files whose `total_size` changes, relative, with their new bytes.

    `growth`: changed file, relative -> bytes that its tensors take more than before.
    """
    new = {}
    for folder in sorted({path.parent for path, more in growth.items() if more}):
        for path in indices_of(base / folder):
            text = _with_size(path, {p.name: more for p, more in growth.items() if p.parent == folder})
            if text is not None:
                new[path.relative_to(base)] = text
    return new


def _with_size(path: Path, growth: Mapping[str, int]) -> bytes | None:
    """The index with the size of its shards as they are now; None where nothing changes or no size is told."""
    try:
        index = json.loads(path.read_bytes())
        total = index.get("metadata", {}).get("total_size")
        more = sum(growth.get(name, 0) for name in set(index["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise FormatError(f"{path}: no index of safetensors shards.", fix="Download the folder again.") from None
    if not more or not isinstance(total, int | float):
        return None
    index["metadata"]["total_size"] = int(total) + more
    return (json.dumps(index, indent=2) + "\n").encode()


def copy_files(
    base: Path,
    files: Sequence[Path],
    output: Output,
    *,
    link: bool = False,
    threads: int = 2,
    progress: ByteCounter | None = None,
) -> None:
    """Copy files of `base`, relative, to the output, or link them where the file system can."""
    for relative in files:
        path = base / relative
        if link and output.folder and _linked(path, output.folder / relative):
            continue
        size = path.stat().st_size
        with open_source(path, size) as source, output.create(relative) as target:
            fill(target, b"", size, copied(source, target, [Range(0, 0, size)]), threads=threads, progress=progress)


def _linked(path: Path, target: Path) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(path.resolve())
    except OSError:  # another disk, or a file system without links
        return False
    return True
