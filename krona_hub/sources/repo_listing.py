"""The files of a repository at one commit, listed by the Hub or from the client's cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from krona_hub.errors import AuthError, IntegrityError, KronaError, NotFoundError, OfflineError
from krona_hub.sources.client import client, is_offline, quiet
from krona_hub.sources.client_errors import hub_errors
from krona_hub.sources.retry import retrying

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class RemoteFile:
    """A file as reported by the Hub."""

    name: str
    size: int | None  # bytes
    sha256: str | None = None  # for files in LFS or Xet storage
    git_sha1: str | None = None  # for files in Git

    @property
    def digest(self) -> str | None:
        return self.sha256 or self.git_sha1


@dataclass(frozen=True)
class Listing:
    """A repository at one commit."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]
    private: bool = False
    gated: bool = False
    tags: tuple[str, ...] = ()
    card: Mapping[str, Any] = field(default_factory=dict)  # front matter of the model card
    issues: tuple[str, ...] = ()  # files that the Hub's scanners flagged
    notes: tuple[str, ...] = ()  # messages to log
    cached: bool = False  # listed from the cache, not from the Hub


def list_repo(repo: str, revision: str | None = None, *, offline: bool = False, endpoint: str | None = None) -> Listing:
    """List the files of `repo` at `revision`, from the cache if the Hub does not respond (see `notes`).

    Makes one request. Raises AuthError, NotFoundError, RateLimitError, or OfflineError if the cache has no copy.
    """
    if offline or is_offline():
        return cached_listing(repo, revision, why="offline")
    try:
        return ask(client(endpoint), repo, revision)
    except OfflineError as down:
        try:
            return cached_listing(repo, revision, why="the Hub does not respond")
        except OfflineError:
            raise down from None
    except (AuthError, NotFoundError) as gone:
        raise _with_copy(gone, repo, revision) from None


def ask(api: HfApi, repo: str, revision: str | None = None) -> Listing:
    """Like `list_repo`, without the cache."""
    what = f"{repo}@{revision}" if revision else repo
    with hub_errors(what), quiet():
        info = retrying(
            lambda: api.model_info(repo, revision=revision, files_metadata=True, securityStatus=revision is None)
        )
    commit = str(info.sha)
    if not COMMIT.fullmatch(commit):  # it becomes the name of a cache folder
        cause = f"{what}: the server sent {commit[:80]!r} instead of a commit."
        raise IntegrityError(cause, fix="The server is not the Hub, or a proxy interferes: check HF_ENDPOINT.")
    files = {s.rfilename: _file(s) for s in info.siblings or ()}
    notes = () if info.id == repo else (f"{repo} was renamed to {info.id}.",)
    card = dict(vars(info.card_data)) if info.card_data else {}
    status = info.security_repo_status or {}
    issues = tuple(str(f.get("path", "")) for f in status.get("filesWithIssues") or ())
    gated = bool(info.gated)
    tags = tuple(info.tags or ())
    return Listing(info.id, commit, files, bool(info.private), gated, tags, card, issues, notes)


def _file(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    sha256 = lfs.sha256 if lfs is not None else None
    return RemoteFile(sibling.rfilename, sibling.size, sha256, None if sha256 else sibling.blob_id)


def _with_copy(gone: KronaError, repo: str, revision: str | None) -> KronaError:
    """Return the same error; if the cache has a copy, its fix explains how to use it."""
    try:
        copy = cached_listing(repo, revision, why="")
    except OfflineError:
        return gone
    gone.fix = f"{gone.fix} To use the cached copy of commit {copy.commit[:7]}, add --offline."
    return gone


def cached_listing(repo: str, revision: str | None, *, why: str) -> Listing:
    """List the files of `repo` in the client's cache. Raises OfflineError if it has none."""
    folder = cache_folder(repo)
    commit = _cached_commit(folder, revision)
    snapshot = folder / "snapshots" / (commit or "-")
    if commit is None or not snapshot.is_dir():
        raise OfflineError(
            f"{repo}: no copy in the cache, and offline mode is enabled.",
            fix="Run krona pull once while online to cache a copy, or set HF_HUB_OFFLINE=0.",
        )
    files = [_cached_file(p, snapshot) for p in sorted(snapshot.rglob("*")) if p.is_file()]
    note = f"Using the cached copy {commit[:7]} of {repo} ({why})."
    return Listing(repo, commit, {f.name: f for f in files}, notes=(note,), cached=True)


def cache_folder(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def snapshot_of(listing: Listing) -> Path:
    """Return the cache folder with the downloaded files of a commit."""
    return cache_folder(listing.repo) / "snapshots" / listing.commit


def blobs_of(listing: Listing) -> Path:
    """Return the cache folder that stores file contents under their digests."""
    return cache_folder(listing.repo) / "blobs"


def _cached_commit(folder: Path, revision: str | None) -> str | None:
    if revision and COMMIT.fullmatch(revision):
        return revision
    ref = folder / "refs" / (revision or "main")
    text = ref.read_text().strip() if ref.is_file() else ""
    return text if COMMIT.fullmatch(text) else None


def _cached_file(path: Path, snapshot: Path) -> RemoteFile:
    """Describe a file of the cache; the name of the blob that it links to is its digest."""
    name = path.relative_to(snapshot).as_posix()
    digest = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", digest):
        return RemoteFile(name, path.stat().st_size, sha256=digest)
    return RemoteFile(name, path.stat().st_size, git_sha1=digest if COMMIT.fullmatch(digest) else None)


def remember_revision(listing: Listing, revision: str | None) -> None:
    """Record the commit of a branch or tag in the cache for offline use, as the client does."""
    folder, name = cache_folder(listing.repo), revision or "main"
    if listing.cached or COMMIT.fullmatch(name) or not folder.is_dir() or ".." in name.split("/"):
        return
    ref = folder / "refs" / name
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(listing.commit)
