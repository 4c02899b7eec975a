"""The local path of an adapter or of a base model, downloaded from the Hub where it is not a path already."""

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
    repo: str  # ns/name
    revision: str | None
    file: str | None


def parse_hub_id(source: str, endpoint: str | None = None) -> HubId | None:
    """Read `hf://ns/name@rev/file`, or the address of its page; None for what cannot be a Hub id.

    A page is one of the Hub that is asked: addresses of other sites are none of ours.

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
    """True where `resolve` would ask the Hub: the caller says so aloud."""
    return _remote(source) is not None


def _remote(source: str | Path) -> HubId | None:
    """The Hub id that is meant: of what is no path, and does not look like the path of a file that is missing."""
    path, hub_id = Path(source).expanduser(), parse_hub_id(str(source))
    if path.exists() or hub_id is None:
        return None
    misspelt = hub_id.file is None and path.suffix == SAFETENSORS and not str(source).startswith("hf://")
    return None if misspelt else hub_id


def resolve(source: str | Path) -> Path:
    """The local path of an adapter or base. Downloads from the Hub only what is no existing path.

    Raises NotFoundError, AuthError or OfflineError with the fix for each.
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
    return f"Did you mean {path.parent / near[0]}?" if near else "Check the path; a Hub id is written ns/name."


def _download(hub_id: HubId) -> Path:
    """The adapter of a repository, in the client's cache, its digest checked; a folder where it is one of PEFT's."""
    listing = _listed(hub_id)
    name = choose(listing.files, listing.repo, hub_id.file)
    paths = fetch_all(listing, with_companions(name, listing.files), revision=hub_id.revision)
    return paths[name].parent if len(paths) > 1 else paths[name]


def _listed(hub_id: HubId) -> Listing:
    """What the repository holds; that a copy is used, or another name, is noted in the log of `krona_hub`."""
    listing = list_repo(hub_id.repo, hub_id.revision)
    for note in listing.notes:
        logging.getLogger("krona_hub").warning(note)
    return listing


def resolve_base(source: str | Path) -> Path:
    """The local path of a base with its weights: a path, or the Hub id of a model, of a folder or a file in it.

    Of a repository the safetensors, configurations and tokenizers are downloaded, into the Hub's own cache; of a
    pipeline not the whole model in one file that often lies beside its components. Each is compared with the digest
    that the Hub names when it arrives; later only its size is, since bases have gigabytes. Raises NotFoundError,
    AuthError or OfflineError with the fix for each; catalogue names are no weights, and not found here, but for the
    base that ships.
    """
    hub_id = _remote(source)
    if hub_id is None:
        return folder_of(Path(source).expanduser())
    if hub_id.file is not None and hub_id.file.endswith(SAFETENSORS):
        return _download(hub_id)
    listing = _listed(hub_id)
    fetch_all(listing, _base_files(listing, hub_id.file), revision=hub_id.revision, again=False)
    return snapshot_of(listing) / (hub_id.file or "")


def _base_files(listing: Listing, folder: str | None) -> list[str]:
    """The files of a base, or of one folder of it."""
    below = f"{folder}/" if folder else ""
    wanted = [n for n in listing.files if n.startswith(below) and any(fnmatch(n, p) for p in BASE_FILES)]
    wanted = [n for n in wanted if is_inside(n)]
    if not any(n.endswith(SAFETENSORS) for n in wanted):
        raise NotFoundError(f"{listing.repo} has no safetensors in {folder or 'it'}.", fix="Check the name.")
    beside = PIPELINE in listing.files
    return [name for name in wanted if not (beside and "/" not in name and name.endswith(SAFETENSORS))]
