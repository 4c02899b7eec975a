"""Files of a repository put in place: every byte that is written has been hashed, and nothing appears by halves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import BinaryIO

from krona_hub.checkpoints import finite
from krona_hub.checkpoints.atomic import atomic_file, atomic_folder
from krona_hub.checkpoints.header import read_header
from krona_hub.errors import KronaError, NonFiniteError
from krona_hub.hub.layout import MANIFEST
from krona_hub.hub.signing import check_signature
from krona_hub.schema.layout import is_native
from krona_hub.schema.validate import native_findings
from krona_hub.sources.fetch import digest_for, fetch
from krona_hub.sources.listing import Listing, RemoteFile
from krona_hub.sources.names import printable

SUFFIX = ".safetensors"
PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class Place:
    """Where the files go."""

    path: Path
    is_file: bool


def is_read_first(listing: Listing, name: str) -> bool:
    """Whether a file is fetched before the large ones: the manifest, and what the Hub names no sha256 of."""
    return name == MANIFEST or listing.files[name].sha256 is None


def put_in_place(
    listing: Listing,
    names: Sequence[str],
    place: Place,
    *,
    overwrite: bool = False,
    verify_key: str | Path | None = None,
    endpoint: str | None = None,
) -> None:
    """Download what is not in the cache yet and copy everything to `place`, which appears whole after every check.

    Raises IntegrityError for other bytes than the Hub names, what `check_file` raises, and what the network brings.
    """
    with ThreadPoolExecutor(1) as beside:
        copies = _Copies(listing, endpoint, beside)
        if place.is_file:
            with atomic_file(place.path, overwrite=overwrite) as out:
                copies.write(names[0], out)
                copies.finish({}, verify_key)
            return
        with atomic_folder(place.path, overwrite=overwrite) as folder:
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with (folder / name).open("wb") as out:
                    copies.write(name, out)
            copies.finish({name: folder / name for name in names}, verify_key)


@dataclass(frozen=True)
class _Copies:
    """Copies of the files of one commit, of which nobody but us knows yet."""

    listing: Listing
    endpoint: str | None
    beside: ThreadPoolExecutor
    checks: dict[str, Future[None]] = field(default_factory=dict)  # of weights, which go on beside the copying

    def write(self, name: str, out: BinaryIO) -> None:
        """Copy a file into `out`: a copy of its own, since the user may edit it and the cache must not notice."""

        def is_right(path: Path, known: RemoteFile) -> bool:
            if name.endswith(SUFFIX):
                self.checks[name] = self.beside.submit(check_file, path, name)
            return copied_intact(path, known, out)

        fetch(self.listing, name, endpoint=self.endpoint, is_right=is_right)

    def finish(self, paths: Mapping[str, Path], verify_key: str | Path | None) -> None:
        """Raise what the checks have found, and what is wrong with the signature where a key is given."""
        for check in self.checks.values():
            check.result()
        if verify_key is not None:
            check_signature(paths, Path(verify_key))


def copied_intact(source: Path, known: RemoteFile, out: BinaryIO) -> bool:
    """Copy a file over what `out` holds; whether the bytes that were written are those that the Hub names.

    Two buffers, used again and again: one is hashed while the other is filled. New ones cost more than the copying.
    """
    out.seek(0)
    out.truncate()
    digest, size, hashed = digest_for(source, known), 0, Future[None]()
    hashed.set_result(None)
    with source.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        for buffer in cycle((memoryview(bytearray(PIECE)), memoryview(bytearray(PIECE)))):
            piece = buffer[: file.readinto(buffer)]
            hashed.result()
            if not piece:
                break
            hashed = beside.submit(digest.update, piece)
            out.write(piece)
            size += len(piece)
    return known.digest in (None, digest.hexdigest()) and known.size in (None, size)


def check_file(path: Path, name: str) -> None:
    """Raise what is wrong with a downloaded safetensors file: structure, schema, limits, NaN and infinity."""
    try:
        header = read_header(path)
        if is_native(header.metadata):
            errors = [f for f in native_findings(header) if f.severity == "error"]
            if errors:
                raise errors[0].error()
        counts = finite.scan(header)
    except KronaError as error:
        error.cause = error.cause.replace(str(path), name)
        raise
    if counts:
        tensor, count = next(iter(counts.items()))
        raise NonFiniteError(
            f"{name}: {count:,} numbers of {printable(tensor)} are NaN or infinite.", fix="Ask its owner to repair it."
        )
