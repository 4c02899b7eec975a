"""Resolving adapters and base models to local paths; Hub ids are downloaded."""

from __future__ import annotations

import logging
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from krona_hub.assets.shipped import folder_of
from krona_hub.checkpoints.file_names import SAFETENSORS
from krona_hub.errors import NotFoundError, OfflineError
from krona_hub.sources.choose_file import choose, with_companions
from krona_hub.sources.client import endpoint_of
from krona_hub.sources.download import fetch_all
from krona_hub.sources.repo_listing import Listing, list_repo, snapshot_of
from krona_hub.sources.safe_names import is_inside

HUB_ID = re.compile(
    r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/[\w.-]+/[\w.-]+|[\w.-]+))?(?:/(?P<file>.+))?$"
)
PAGE = re.compile(
    r"https?://(?P<host>[^/]+)/(?P<repo>[\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve)/(?P<revision>[\w.-]+)(?:/(?P<file>.+))?)?/?$"
)
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
BASE_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")  # never pickles
PIPELINE = "model_index.json"


class HubId(NamedTuple):
    """A repository on the Hub, with an optional revision and file."""

    repo: str  # ns/name
    revision: str | None
    file: str | None


def parse_hub_id(source: str, endpoint: str | None = None) -> HubId | None:
    """Parse `hf://ns/name@rev/file`, `ns/name@rev/file` or the URL of a Hub page; None if it is not a Hub id.

    URLs must belong to the Hub or to the server at `endpoint`.

    >>> parse_hub_id("hf://ns/name@v1/sub/x.safetensors")
    HubId(repo='ns/name', revision='v1', file='sub/x.safetensors')
    >>> parse_hub_id("./here.safetensors") is None
    True
    """
    if source.startswith((".", "/", "~")):
        return None
    if "://" in source and not source.startswith("hf://"):
        found = PAGE.match(source.partition("?")[0])
        ours = (*HOSTS, urlsplit(endpoint_of(endpoint)).netloc)
        found = found if found and found["host"].lower() in ours else None
    else:
        found = HUB_ID.match(source)
    return HubId(*found.group("repo", "revision", "file")) if found else None


def is_remote(source: str | Path) -> bool:
    """Return whether `resolve` would contact the Hub, so that the caller can log it."""
    return _remote(source) is not None


def _remote(source: str | Path) -> HubId | None:
    """Return the Hub id, unless the source is an existing path or looks like the path of a missing file."""
    path, hub_id = Path(source).expanduser(), parse_hub_id(str(source))
    if path.exists() or hub_id is None:
        return None
    is_missing_file = hub_id.file is None and path.suffix == SAFETENSORS and not str(source).startswith("hf://")
    return None if is_missing_file else hub_id


def resolve(source: str | Path) -> Path:
    """Return the local path of an adapter or base model; downloads from the Hub only if no such path exists.

    Raises NotFoundError, AuthError or OfflineError, each with a fix.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    hub_id = _remote(source)
    if hub_id is None:
        raise NotFoundError(f"{source}: no such file or folder.", fix=_similar(path))
    try:
        return _download(hub_id)
    except OfflineError as error:
        error.cause = f"no such local path, and {error.cause}"
        raise


def _similar(path: Path) -> str:
    from difflib import get_close_matches

    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    return f"Did you mean {path.parent / near[0]}?" if near else "Check the path; a Hub id has the form ns/name."


def _download(hub_id: HubId) -> Path:
    """Download the adapter of a repository to the client's cache and check it; PEFT adapters give a folder."""
    listing = _listing_of(hub_id)
    name = choose(listing.files, listing.repo, hub_id.file)
    paths = fetch_all(listing, with_companions(name, listing.files), revision=hub_id.revision)
    return paths[name].parent if len(paths) > 1 else paths[name]


def _listing_of(hub_id: HubId) -> Listing:
    """List the repository; logs a warning if a cached copy is used or the repository was renamed."""
    listing = list_repo(hub_id.repo, hub_id.revision)
    for note in listing.notes:
        logging.getLogger("krona_hub").warning(note)
    return listing


def resolve_base(source: str | Path) -> Path:
    """Return the local path of a base model: a path, or the Hub id of a model, of a folder or of a file in it.

    Downloads the safetensors, configurations and tokenizers of a repository to the Hub cache. For a pipeline it skips
    single-file checkpoints beside the components. Downloads are compared with the digests that the Hub reports; cached
    files are compared by size only, because base models have gigabytes. Raises NotFoundError, AuthError or
    OfflineError, each with a fix. Catalog names have no weights and are not resolved here, except for the base model
    that ships with the package.
    """
    hub_id = _remote(source)
    if hub_id is None:
        return folder_of(Path(source).expanduser())
    if hub_id.file is not None and hub_id.file.endswith(SAFETENSORS):
        return _download(hub_id)
    listing = _listing_of(hub_id)
    fetch_all(listing, _base_files(listing, hub_id.file), revision=hub_id.revision, again=False)
    return snapshot_of(listing) / (hub_id.file or "")


def _base_files(listing: Listing, folder: str | None) -> list[str]:
    """Return the files of a base model, or of one folder of it."""
    prefix = f"{folder}/" if folder else ""
    wanted = [n for n in listing.files if n.startswith(prefix) and any(fnmatch(n, p) for p in BASE_FILES)]
    wanted = [n for n in wanted if is_inside(n)]
    if not any(n.endswith(SAFETENSORS) for n in wanted):
        raise NotFoundError(
            f"{listing.repo} has no safetensors files{f' in {folder}' if folder else ''}.", fix="Check the name."
        )
    is_pipeline = PIPELINE in listing.files
    return [name for name in wanted if not (is_pipeline and "/" not in name and name.endswith(SAFETENSORS))]
