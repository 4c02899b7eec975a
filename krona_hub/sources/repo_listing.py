"""The files of a repository at one commit: from the Hub, or from what is left of it in the client's cache."""

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
    """A file as the Hub describes it."""

    name: str
    size: int | None  # bytes
    sha256: str | None = None  # of a file in large storage
    git_sha1: str | None = None  # of a file in git

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
    card: Mapping[str, Any] = field(default_factory=dict)  # its front matter
    issues: tuple[str, ...] = ()  # files that the Hub's scanners complain about
    notes: tuple[str, ...] = ()  # what has to be said aloud
    cached: bool = False  # not asked of the Hub: what the cache holds


def list_repo(repo: str, revision: str | None = None, *, offline: bool = False, endpoint: str | None = None) -> Listing:
    """The files of `repo` at `revision`; of the cache where the Hub does not answer, which `notes` say aloud.

    One request. Raises AuthError, NotFoundError, RateLimitError, or OfflineError where the cache has nothing either.
    """
    if offline or is_offline():
        return cached_listing(repo, revision, why="offline")
    try:
        return ask(client(endpoint), repo, revision)
    except OfflineError as down:
        try:
            return cached_listing(repo, revision, why="the Hub does not answer")
        except OfflineError:
            raise down from None
    except (AuthError, NotFoundError) as gone:
        raise _with_copy(gone, repo, revision) from None


def ask(api: HfApi, repo: str, revision: str | None = None) -> Listing:
    """As `list_repo`, of the Hub alone."""
    what = f"{repo}@{revision}" if revision else repo
    with hub_errors(what), quiet():
        info = retrying(
            lambda: api.model_info(repo, revision=revision, files_metadata=True, securityStatus=revision is None)
        )
    commit = str(info.sha)
    if not COMMIT.fullmatch(commit):  # folders of the cache are called like it
        told = f"{what}: the server names no commit, but {commit[:80]!r}."
        raise IntegrityError(told, fix="This is not the Hub, or somebody is in between: check HF_ENDPOINT.")
    files = {s.rfilename: _file(s) for s in info.siblings or ()}
    notes = () if info.id == repo else (f"{repo} is now called {info.id}.",)
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
    """The same error; where the cache still holds a copy, its fix says how to use it."""
    try:
        copy = cached_listing(repo, revision, why="")
    except OfflineError:
        return gone
    gone.fix = f"{gone.fix} A copy of commit {copy.commit[:7]} is in the cache: --offline uses it."
    return gone


def cached_listing(repo: str, revision: str | None, *, why: str) -> Listing:
    """What the client's cache holds of `repo`. Raises OfflineError where that is nothing."""
    folder = cache_folder(repo)
    commit = _cached_commit(folder, revision)
    place = folder / "snapshots" / (commit or "-")
    if commit is None or not place.is_dir():
        raise OfflineError(
            f"{repo}: no copy of it is in the cache, and the Hub is not asked: offline.",
            fix="Connect once: krona pull keeps a copy. HF_HUB_OFFLINE=0 asks the Hub.",
        )
    files = [_cached_file(p, place) for p in sorted(place.rglob("*")) if p.is_file()]
    note = f"offline copy {commit[:7]} of {repo} used ({why})."
    return Listing(repo, commit, {f.name: f for f in files}, notes=(note,), cached=True)


def cache_folder(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def snapshot_of(listing: Listing) -> Path:
    """The folder of the client's cache that the files of a commit are in, those that were downloaded."""
    return cache_folder(listing.repo) / "snapshots" / listing.commit


def blobs_of(listing: Listing) -> Path:
    """The folder of the client's cache that the contents of files are in, under their digests."""
    return cache_folder(listing.repo) / "blobs"


def _cached_commit(folder: Path, revision: str | None) -> str | None:
    if revision and COMMIT.fullmatch(revision):
        return revision
    ref = folder / "refs" / (revision or "main")
    text = ref.read_text().strip() if ref.is_file() else ""
    return text if COMMIT.fullmatch(text) else None


def _cached_file(path: Path, place: Path) -> RemoteFile:
    """A file of the cache; the name of the blob behind it is its digest."""
    name = path.relative_to(place).as_posix()
    digest = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", digest):
        return RemoteFile(name, path.stat().st_size, sha256=digest)
    return RemoteFile(name, path.stat().st_size, git_sha1=digest if COMMIT.fullmatch(digest) else None)


def remember_revision(listing: Listing, revision: str | None) -> None:
    """Note in the cache which commit a branch or tag is, as the client itself does, for use without a network."""
    folder, name = cache_folder(listing.repo), revision or "main"
    if listing.cached or COMMIT.fullmatch(name) or not folder.is_dir() or ".." in name.split("/"):
        return
    ref = folder / "refs" / name
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(listing.commit)
