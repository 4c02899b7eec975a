"""Files of a repository put in place: every byte that is written has been hashed, and nothing appears by halves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from krona_hub.checkpoints import finite_scan
from krona_hub.checkpoints.atomic import atomic_file, atomic_folder
from krona_hub.checkpoints.header import read_header
from krona_hub.errors import KronaError, NonFiniteError
from krona_hub.hub.repo_layout import MANIFEST
from krona_hub.hub.signing import check_signature
from krona_hub.schema.tensor_layout import is_native
from krona_hub.schema.validate import native_findings
from krona_hub.sources.download import digest_for, fetch
from krona_hub.sources.follow_download import PIECE, Follower
from krona_hub.sources.repo_listing import Listing, RemoteFile, blobs_of
from krona_hub.sources.safe_names import printable

SUFFIX = ".safetensors"
AT_ONCE = 32 << 20  # bytes that wait for the disk at most


@dataclass(frozen=True)
class PullDestination:
    """Where the files go."""

    path: Path
    is_file: bool


def is_read_first(listing: Listing, name: str) -> bool:
    """Whether a file is fetched before the large ones: the manifest, and what the Hub names no sha256 of."""
    return name == MANIFEST or listing.files[name].sha256 is None


def put_in_place(
    listing: Listing,
    names: Sequence[str],
    place: PullDestination,
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
        known = self.listing.files[name]
        copy = _Copy(out, known)

        def is_right(path: Path, known: RemoteFile) -> bool:
            if name.endswith(SUFFIX):
                self.checks[name] = self.beside.submit(check_file, path, name)
            return (follower.has_taken(path) and copy.is_right()) or copy.of(path).is_right()

        with Follower(blobs_of(self.listing), known.digest or "none", copy.take) as follower:
            fetch(self.listing, name, endpoint=self.endpoint, is_right=is_right)

    def finish(self, paths: Mapping[str, Path], verify_key: str | Path | None) -> None:
        """Raise what the checks have found, and what is wrong with the signature where a key is given."""
        for check in self.checks.values():
            check.result()
        if verify_key is not None:
            check_signature(paths, Path(verify_key))


class _Copy:
    """A copy of a file, and the digest of the bytes that were written."""

    def __init__(self, out: BinaryIO, known: RemoteFile) -> None:
        self.out, self.known = out, known
        self.digest, self.size = digest_for(known), 0

    def take(self, piece: memoryview) -> None:
        self.digest.update(piece)
        self.out.write(piece)
        self.size += len(piece)
        if self.size % AT_ONCE < len(piece):
            os.fsync(self.out.fileno())  # while the next ones are on their way, so that there is little to wait for

    def of(self, source: Path) -> _Copy:
        """A copy of this file over whatever was written so far."""
        self.out.seek(0)
        self.out.truncate()
        self.digest, self.size = digest_for(replace(self.known, size=source.stat().st_size)), 0
        buffer = memoryview(bytearray(PIECE))  # one, used again and again: new ones cost more than the copying
        with source.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                self.take(buffer[:count])
        return self

    def is_right(self) -> bool:
        """Whether size and digest are those that the Hub names."""
        return self.known.digest in (None, self.digest.hexdigest()) and self.known.size in (None, self.size)


def check_file(path: Path, name: str) -> None:
    """Raise what is wrong with a downloaded safetensors file: structure, schema, limits, NaN and infinity."""
    try:
        header = read_header(path)
        if is_native(header.metadata):
            errors = [f for f in native_findings(header) if f.severity == "error"]
            if errors:
                raise errors[0].error()
        counts = finite_scan.scan(header)
    except KronaError as error:
        error.cause = error.cause.replace(str(path), name)
        raise
    if counts:
        tensor, count = next(iter(counts.items()))
        raise NonFiniteError(
            f"{name}: {count:,} numbers of {printable(tensor)} are NaN or infinite.", fix="Ask its owner to repair it."
        )
