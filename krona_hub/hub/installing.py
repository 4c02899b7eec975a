"""Install the files of a repository: every written byte is hashed, and nothing appears partially."""

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
AT_ONCE = 32 << 20  # bytes between two flushes to disk


@dataclass(frozen=True)
class PullDestination:
    """The folder or the file that a pull writes."""

    path: Path
    is_file: bool


def is_read_first(listing: Listing, name: str) -> bool:
    """Whether a file is fetched before the large ones: the manifest, and files without a sha256 on the Hub."""
    return name == MANIFEST or listing.files[name].sha256 is None


def install_files(
    listing: Listing,
    names: Sequence[str],
    destination: PullDestination,
    *,
    overwrite: bool = False,
    verify_key: str | Path | None = None,
    endpoint: str | None = None,
) -> None:
    """Download what is not cached yet and copy all files to `destination`, which appears whole after every check.

    Raises IntegrityError if bytes differ from the Hub's digests, and the errors of `check_file` and of the network.
    """
    with ThreadPoolExecutor(1) as executor:
        copies = _Copies(listing, endpoint, executor)
        if destination.is_file:
            with atomic_file(destination.path, overwrite=overwrite) as out:
                copies.write(names[0], out)
                copies.finish({}, verify_key)
            return
        with atomic_folder(destination.path, overwrite=overwrite) as folder:
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with (folder / name).open("wb") as out:
                    copies.write(name, out)
            copies.finish({name: folder / name for name in names}, verify_key)


@dataclass(frozen=True)
class _Copies:
    """Copies of the files of one commit, not yet visible at the destination."""

    listing: Listing
    endpoint: str | None
    executor: ThreadPoolExecutor
    checks: dict[str, Future[None]] = field(default_factory=dict)  # of weights, which run during the copying

    def write(self, name: str, out: BinaryIO) -> None:
        """Copy a file into `out`, so that later edits by the user never reach the cache."""
        known = self.listing.files[name]
        copy = _Copy(out, known)

        def is_right(path: Path, known: RemoteFile) -> bool:
            if name.endswith(SUFFIX):
                self.checks[name] = self.executor.submit(check_file, path, name)
            return (follower.has_taken(path) and copy.is_right()) or copy.restart_from(path).is_right()

        with Follower(blobs_of(self.listing), known.digest or "none", copy.take) as follower:
            fetch(self.listing, name, endpoint=self.endpoint, is_right=is_right)

    def finish(self, paths: Mapping[str, Path], verify_key: str | Path | None) -> None:
        """Raise what the checks have found; verify the signature if a key is given."""
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
            os.fsync(self.out.fileno())  # overlaps with the download, so that little is left to flush

    def restart_from(self, source: Path) -> _Copy:
        """Replace whatever was written so far with a copy of this file."""
        self.out.seek(0)
        self.out.truncate()
        self.digest, self.size = digest_for(replace(self.known, size=source.stat().st_size)), 0
        buffer = memoryview(bytearray(PIECE))  # reused, since allocating costs more than copying
        with source.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                self.take(buffer[:count])
        return self

    def is_right(self) -> bool:
        """Whether size and digest match those on the Hub."""
        return self.known.digest in (None, self.digest.hexdigest()) and self.known.size in (None, self.size)


def check_file(path: Path, name: str) -> None:
    """Check a downloaded safetensors file: structure, schema, limits, NaN and infinity. Raises the first error."""
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
            f"{name}: {count:,} values of {printable(tensor)} are NaN or infinite.", fix="Ask the owner to fix it."
        )
