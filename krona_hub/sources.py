"""A path or a Hub id becomes a local path. The only module outside `hub/` that may touch the network.

A source is a path if it exists; otherwise `hf://ns/name[@revision][/file]` or `ns/name[@revision][/file]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from krona_hub.bases.shipped import folder_of
from krona_hub.errors import AmbiguousError, AuthError, KronaError, NotFoundError, OfflineError

HUB_ID = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>.+))?$")
WEIGHTS = ".safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"  # means nothing without the adapter_config.json beside it


class HubId(NamedTuple):
    repo: str  # ns/name
    revision: str | None
    file: str | None


def parse_hub_id(source: str) -> HubId | None:
    """Read `hf://ns/name@rev/file`; None for what cannot be a Hub id.

    >>> parse_hub_id("hf://ns/name@v1/sub/x.safetensors")
    HubId(repo='ns/name', revision='v1', file='sub/x.safetensors')
    >>> parse_hub_id("./here.safetensors") is None
    True
    """
    if source.startswith((".", "/", "~")):
        return None
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
    misspelt = hub_id.file is None and path.suffix == WEIGHTS and not str(source).startswith("hf://")
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
    return _download(hub_id)


def _similar(path: Path) -> str:
    from difflib import get_close_matches

    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    return f"Did you mean {path.parent / near[0]}?" if near else "Check the path; a Hub id is written ns/name."


def _download(hub_id: HubId) -> Path:
    with _hub_errors(hub_id):
        from huggingface_hub import hf_hub_download

        name = hub_id.file or _only_adapter(hub_id)
        path = Path(hf_hub_download(hub_id.repo, name, revision=hub_id.revision))
        if path.name != PEFT_WEIGHTS:
            return path
        hf_hub_download(hub_id.repo, str(Path(name).with_name("adapter_config.json")), revision=hub_id.revision)
        return path.parent


@contextmanager
def _hub_errors(hub_id: HubId) -> Iterator[None]:
    """Errors of the client as ours."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        yield
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as e:
        raise AuthError(
            f"{hub_id.repo}: not found on the Hub, or private or gated.",
            fix="Check the name; for a private or gated repository accept its terms and run `hf auth login`.",
        ) from e
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError) as e:
        if isinstance(e, errors.LocalEntryNotFoundError):
            raise _offline(hub_id) from e
        raise NotFoundError(f"{hub_id.repo} has no {hub_id.file or hub_id.revision}.", fix="Check both names.") from e
    except KronaError:
        raise
    except (httpx.HTTPError, errors.OfflineModeIsEnabled, OSError) as e:
        raise _offline(hub_id) from e


def _only_adapter(hub_id: HubId) -> str:
    """The one safetensors file of a repository; pickles are never taken in its place."""
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(hub_id.repo, revision=hub_id.revision)
    weights = [f for f in files if f.endswith(WEIGHTS)]
    if not weights:
        raise NotFoundError(f"{hub_id.repo} has no safetensors file.", fix="Ask its owner for one: pickles are unsafe.")
    if len(weights) > 1:
        raise AmbiguousError(
            f"{hub_id.repo} has {len(weights)} safetensors files.",
            fix=f"Name one: {hub_id.repo}/{weights[0]}",
        )
    return weights[0]


def _offline(hub_id: HubId) -> OfflineError:
    return OfflineError(
        f"{hub_id.repo}: no such local path, and the Hub cannot be reached.",
        fix="Check the connection, or give the path of a local file.",
    )


# ── bases ────────────────────────────────────────────────────────────────────────────────────────

BASE_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")  # never pickles
PIPELINE = "model_index.json"


def resolve_base(source: str | Path) -> Path:
    """The local path of a base with its weights: a path, or the Hub id of a model, of a folder or a file in it.

    Of a repository the safetensors, configurations and tokenizers are downloaded, into the Hub's own cache; of a
    pipeline not the whole model in one file that often lies beside its components. Raises NotFoundError, AuthError or
    OfflineError with the fix for each; catalogue names are no weights, and not found here, but for the base that ships.
    """
    hub_id = _remote(source)
    if hub_id is None:
        return folder_of(Path(source).expanduser())
    if hub_id.file is not None and hub_id.file.endswith(WEIGHTS):
        return _download(hub_id)
    with _hub_errors(hub_id):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(hub_id.repo, revision=hub_id.revision, allow_patterns=_base_files(hub_id))
        return Path(folder) / (hub_id.file or "")


def _base_files(hub_id: HubId) -> list[str]:
    """The files of a base; without a network, patterns for what the cache holds."""
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        names = HfApi().list_repo_files(hub_id.repo, revision=hub_id.revision)
    except (errors.OfflineModeIsEnabled, httpx.TransportError):
        return list(BASE_FILES)
    below = f"{hub_id.file}/" if hub_id.file else ""
    wanted = [n for n in names if n.startswith(below) and any(fnmatch(n, p) for p in BASE_FILES)]
    if not wanted:
        raise NotFoundError(f"{hub_id.repo} has no safetensors in {hub_id.file or 'it'}.", fix="Check the name.")
    beside = PIPELINE in names
    return [name for name in wanted if not (beside and "/" not in name and name.endswith(WEIGHTS))]
