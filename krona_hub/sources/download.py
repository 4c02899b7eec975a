"""Files of a repository on this disk, each with the digest that the Hub names: the client itself does not look."""

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
ROOM = 2  # times the bytes of a download that must be free: the cache's copy and the user's


def fetch(listing: Listing, name: str, *, endpoint: str | None = None, is_right: IsRight | None = None) -> Path:
    """The path of a file in the client's cache, downloaded where it is not there, its digest checked.

    `is_right` does the looking where it can be done on the way. A file that is not what the Hub says is removed and
    downloaded once more. Raises IntegrityError where it is wrong again, and what the network brings.
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
        f"{listing.repo}/{name} is not what the Hub says: its sha256 differs.",
        fix="It was removed from the cache. Pull again; if it happens again, something in between changes it.",
    )


def fetch_all(
    listing: Listing,
    names: Iterable[str],
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    again: bool = True,
) -> dict[str, Path]:
    """Name -> path of several files. Checks that the disk has room for those that are to come.

    `again=False` hashes only those: of what lies in the cache already, the size is compared.
    """
    names, place = list(names), snapshot_of(listing)
    here = {n: place / n for n in names if _is_here(place / n, listing.files[n])}
    check_room(sum(listing.files[n].size or 0 for n in names if n not in here))
    paths = here if not again else {}
    for name in names:
        if name not in paths:
            paths[name] = fetch(listing, name, endpoint=endpoint)
    remember_revision(listing, revision)
    return paths


def _is_here(path: Path, known: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == known.size


def check_room(nbytes: int) -> None:
    """Raise ResourceError unless the disk of the cache has room for a download of that size."""
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE).expanduser()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if ROOM * nbytes > free:
        raise ResourceError(
            f"{nbytes / 1e6:,.0f} MB are to be downloaded, and {place} has {free / 1e6:,.0f} MB left.",
            fix="Free some space, or set HF_HOME to another disk. `hf cache prune` removes old copies.",
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
    """Take a file out of the cache, the blob behind the link too."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def is_intact(path: Path, known: RemoteFile) -> bool:
    """Whether the file has the size and the digest that the Hub names."""
    if known.size is not None and path.stat().st_size != known.size:
        return False
    if known.sha256:
        return file_sha256(path) == known.sha256
    return not known.git_sha1 or git_sha1_of(path) == known.git_sha1


def digest_for(known: RemoteFile) -> hashlib._Hash:
    """What has to be fed with the bytes of a file to get the digest that the Hub names: sha256, or the sha1 of git."""
    return hashlib.sha256() if known.sha256 else hashlib.sha1(b"blob %d\0" % (known.size or 0))


def git_sha1_of(path: Path) -> str:
    """The digest that git gives a file: of its length and its bytes."""
    digest = digest_for(RemoteFile(path.name, path.stat().st_size))
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()
