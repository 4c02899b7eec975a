"""Downloading files of a repository, with a check of their digests, which the client omits."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from krona_hub.checkpoints.digest import file_sha256
from krona_hub.errors import IntegrityError, OfflineError, ResourceError
from krona_hub.sources.client import client, quiet
from krona_hub.sources.client_errors import hub_errors
from krona_hub.sources.repo_listing import Listing, RemoteFile, remember_revision, snapshot_of
from krona_hub.sources.retry import retrying

IsRight = Callable[[Path, RemoteFile], bool]
CHUNK = 1 << 22  # bytes
ROOM = 2  # multiple of the download size that must be free: for the cache's copy and the user's copy


def fetch(listing: Listing, name: str, *, endpoint: str | None = None, is_right: IsRight | None = None) -> Path:
    """Return the path of a file in the client's cache; downloads it if it is missing, and checks its digest.

    `is_right` replaces the check, for callers that hash during the download. A file with a wrong digest is removed and
    downloaded once more. Raises IntegrityError if it is wrong again, and the errors of the download.
    """
    known, is_right = listing.files[name], is_right or is_intact
    path = _download(listing, name, endpoint)
    if is_right(path, known):
        return path
    _remove(path)
    if not listing.cached:
        path = _download(listing, name, endpoint, force=True)
        if is_right(path, known):
            return path
        _remove(path)
    raise IntegrityError(
        f"{listing.repo}/{name} differs from the file on the Hub: its sha256 does not match.",
        fix="Pull again: the file was removed from the cache. If the error persists, check the proxy.",
    )


def fetch_all(
    listing: Listing,
    names: Iterable[str],
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    again: bool = True,
) -> dict[str, Path]:
    """Fetch several files and return a mapping from name to path; checks the free disk space first.

    With `again=False` only new downloads are hashed; for files that are already in the cache, the size is compared.
    """
    names, folder = list(names), snapshot_of(listing)
    cached = {n: folder / n for n in names if _is_cached(folder / n, listing.files[n])}
    check_room(sum(listing.files[n].size or 0 for n in names if n not in cached))
    paths = cached if not again else {}
    for name in names:
        if name not in paths:
            paths[name] = fetch(listing, name, endpoint=endpoint)
    remember_revision(listing, revision)
    return paths


def _is_cached(path: Path, known: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == known.size


def check_room(nbytes: int) -> None:
    """Raise ResourceError unless the disk of the cache has enough free space for a download of that size."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).expanduser()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if ROOM * nbytes > free:
        raise ResourceError(
            f"the download of {nbytes / 1e6:,.0f} MB does not fit in {folder}: {free / 1e6:,.0f} MB are free.",
            fix="Free up disk space, or set HF_HOME to another disk. `hf cache prune` removes old copies.",
        )


def _download(listing: Listing, name: str, endpoint: str | None, *, force: bool = False) -> Path:
    if listing.cached:
        path = snapshot_of(listing) / name
        if not path.is_file():
            raise OfflineError(f"{listing.repo}/{name} is not in the cache.", fix="Connect and pull again.")
        return path
    api = client(endpoint)
    with hub_errors(f"{listing.repo}/{name}"), quiet(listing.files[name].size or 0):
        return Path(
            retrying(lambda: api.hf_hub_download(listing.repo, name, revision=listing.commit, force_download=force))
        )


def _remove(path: Path) -> None:
    """Remove a file from the cache, including the blob that it links to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def is_intact(path: Path, known: RemoteFile) -> bool:
    """Return whether the file has the size and the digest that the Hub reports."""
    if known.size is not None and path.stat().st_size != known.size:
        return False
    if known.sha256:
        return file_sha256(path) == known.sha256
    return not known.git_sha1 or git_sha1_of(path) == known.git_sha1


def digest_for(known: RemoteFile) -> hashlib._Hash:
    """Return the hash object for the digest that the Hub reports: sha256, or the SHA-1 of a Git blob."""
    return hashlib.sha256() if known.sha256 else hashlib.sha1(b"blob %d\0" % (known.size or 0))


def git_sha1_of(path: Path) -> str:
    """Return the Git blob SHA-1 of a file, computed from its length and its bytes."""
    digest = digest_for(RemoteFile(path.name, path.stat().st_size))
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()
