"""Browse adapters: the contents of a repository, a search of the Hub, and the local cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from krona_hub.bases import catalog
from krona_hub.checkpoints.file_names import DIFFUSERS_WEIGHTS, PEFT_WEIGHTS
from krona_hub.checkpoints.file_names import SAFETENSORS as SUFFIX
from krona_hub.errors import UsageError
from krona_hub.hub.local_adapter import HUB_NAME
from krona_hub.hub.preview import Preview, preview
from krona_hub.hub.repo_layout import CONFIG, MODEL_TYPE, WEIGHTS
from krona_hub.sources import parse_hub_id
from krona_hub.sources.choose_file import choose
from krona_hub.sources.client import client, quiet
from krona_hub.sources.client_errors import THE_HUB, hub_errors
from krona_hub.sources.repo_listing import RemoteFile, list_repo
from krona_hub.sources.retry import retrying
from krona_hub.sources.safe_names import is_safe, printable


@dataclass(frozen=True)
class RepoInfo:
    """A repository as described by its listing, its config and the header of its adapter."""

    repo: str
    commit: str
    private: bool | None  # None for a cached copy, where it is unknown
    gated: bool | None
    base_model: str | None
    licence: str | None
    tags: tuple[str, ...]
    files: tuple[RemoteFile, ...]
    preview: Preview
    issues: tuple[str, ...]  # files flagged by the Hub's scanners
    notes: tuple[str, ...]


def info(source: str, *, offline: bool = False, endpoint: str | None = None) -> RepoInfo:
    """Describe `ns/name[@revision][/file]` in at most four requests, without downloading its weights."""
    hub_id = parse_hub_id(source, endpoint)
    if hub_id is None:
        raise UsageError(f"Invalid Hub id {source!r}.", fix="Write ns/name or ns/name@revision.")
    listing = list_repo(hub_id.repo, hub_id.revision, offline=offline, endpoint=endpoint)
    described = preview(listing, choose(listing.files, listing.repo, hub_id.file), endpoint=endpoint)
    base = (described.config or {}).get("base_model") or listing.card.get("base_model")
    return RepoInfo(
        repo=listing.repo,
        commit=listing.commit,
        private=None if listing.cached else listing.private,
        gated=None if listing.cached else listing.gated,
        base_model=printable(str(base)) if base else None,
        licence=printable(str(listing.card.get("license"))) if listing.card.get("license") else None,
        tags=tuple(map(printable, listing.tags)),
        files=tuple(replace(f, name=printable(f.name)) for f in listing.files.values()),
        preview=described,
        issues=tuple(map(printable, listing.issues)),
        notes=listing.notes,
    )


@dataclass(frozen=True)
class SearchHit:
    """A search result."""

    repo: str
    base_models: tuple[str, ...]
    downloads: int | None
    likes: int | None
    updated: str | None  # a date


def search(
    text: str | None = None, *, base: str | None = None, limit: int = 20, endpoint: str | None = None
) -> tuple[SearchHit, ...]:
    """Search the Hub for krona adapters, optionally for one base model, with the most downloads first."""
    filters = ["krona", *([f"base_model:adapter:{_base_id(base)}"] if base else [])]
    api = client(endpoint)
    with hub_errors(THE_HUB), quiet():
        found = retrying(lambda: list(api.list_models(filter=filters, search=text, limit=limit, sort="downloads")))
    return tuple(_search_hit(m) for m in found)


def _base_id(base: str) -> str:
    if base in catalog.names():
        return catalog.get(base).hub_id or base
    if not HUB_NAME.fullmatch(base):
        return catalog.get(base).hub_id or base  # raises, with the nearest name
    return base


def _search_hit(model: Any) -> SearchHit:
    start = "base_model:adapter:"
    bases = tuple(printable(t.removeprefix(start)) for t in model.tags or () if t.startswith(start))
    when = model.last_modified or model.created_at
    return SearchHit(printable(model.id), bases, model.downloads, model.likes, str(when.date()) if when else None)


@dataclass(frozen=True)
class Cached:
    """An adapter in the local Hub cache."""

    repo: str
    commit: str
    revisions: tuple[str, ...]  # branches and tags that point to the commit
    files: tuple[str, ...]  # adapter files
    bytes: int  # total size of the cached files
    base_model: str | None
    path: Path


def cached() -> tuple[Cached, ...]:
    """List the adapters in the local Hub cache, without network access."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        with quiet():
            repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return ()
    found = (c for repo in repos if repo.repo_type == "model" for c in _adapters(repo))
    return tuple(sorted(found, key=lambda c: (c.repo, c.commit)))


def _adapters(repo: Any) -> Iterator[Cached]:
    for revision in repo.revisions:
        names = sorted(f.file_path.relative_to(revision.snapshot_path).as_posix() for f in revision.files)
        config = _config(revision.snapshot_path / CONFIG)
        ours = config.get("model_type") == MODEL_TYPE or WEIGHTS in names
        known = [n for n in names if n.rpartition("/")[2] in (WEIGHTS, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS)]
        weights = tuple(n for n in names if n.endswith(SUFFIX) and is_safe(n)) if ours else tuple(known)
        if weights:
            base = config.get("base_model")
            refs = tuple(sorted(revision.refs))
            size = revision.size_on_disk
            yield Cached(
                repo.repo_id, revision.commit_hash, refs, weights, size, base and printable(str(base)),
                revision.snapshot_path,
            )  # fmt: skip


def _config(path: Path) -> dict[str, Any]:
    from krona_hub.checkpoints import strict_json
    from krona_hub.errors import KronaError

    try:
        return strict_json.parse(path.read_bytes()) if path.is_file() else {}
    except (KronaError, OSError):
        return {}
