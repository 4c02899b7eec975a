"""The files of a model folder: list them, find those that a merge makes stale, and copy the rest. Torch-free."""

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

CACHES = (
    ".git",
    ".cache",
)  # the history of a clone and the records of the Hub client: large, and not part of the model
INDEX = re.compile(r"\.index(\.[^.]+)?\.json$")  # of the default weights or a variant


def files_below(folder: Path) -> list[Path]:
    """Return the files of a folder and its subfolders, relative and sorted.

    Links are followed; temporary files of killed writers are skipped. Raises NotFoundError for a broken link,
    ConflictError for a pipe, a device or a link loop.
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
            raise NotFoundError(f"The link {str(child)!r} is broken.", fix="Download the folder again.")
        if child.is_dir():
            yield from _walk_into(child, above)
        elif stat.S_ISREG(child.stat().st_mode):
            yield child
        else:
            raise ConflictError(f"{str(child)!r} is neither a file nor a folder.", fix="Remove it from the folder.")


def _walk_into(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        raise ConflictError(f"{str(folder)!r} is a link to a folder that contains it.", fix="Remove the link.")
    if folder.name not in CACHES:
        yield from _walk(folder, (*above, real))


def stale(files: Iterable[Path], changed: Collection[Path]) -> list[Path]:
    """Return the files with other copies of the weights of a changed component, and their indices: not merged.

    >>> names = ["unet/a.safetensors", "unet/a.bin", "unet/a.bin.index.json", "vae/b.bin"]
    >>> [p.name for p in stale(map(Path, names), {Path("unet/a.safetensors")})]
    ['a.bin', 'a.bin.index.json']
    """
    folders = {path.parent for path in changed}
    return [path for path in files if path.parent in folders and INDEX.sub("", path.name).endswith(OTHER_WEIGHTS)]


def indices(base: Path, growth: Mapping[Path, int]) -> dict[Path, bytes]:
    """Return the index files whose `total_size` changes, relative, with their new bytes.

    `growth` maps each changed file, relative, to the bytes by which its tensors grow.
    """
    new = {}
    for folder in sorted({path.parent for path, more in growth.items() if more}):
        for path in indices_of(base / folder):
            text = _with_size(path, {p.name: more for p, more in growth.items() if p.parent == folder})
            if text is not None:
                new[path.relative_to(base)] = text
    return new


def _with_size(path: Path, growth: Mapping[str, int]) -> bytes | None:
    """Return the index with the new total size, None if it does not change or is not recorded."""
    try:
        index = json.loads(path.read_bytes())
        total = index.get("metadata", {}).get("total_size")
        more = sum(growth.get(name, 0) for name in set(index["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise FormatError(
            f"{path} is not a valid index of safetensors shards.", fix="Download the folder again."
        ) from None
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
    """Copy files of `base`, relative, to the output, or hard-link them if the file system supports it."""
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
