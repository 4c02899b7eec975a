"""The plan of a push, file by file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from krona_hub.checkpoints.digest import file_sha256_once
from krona_hub.errors import ConflictError
from krona_hub.hub.push_package import RepoState
from krona_hub.hub.repo_layout import CARD, CONFIG, MANIFEST, MODEL_TYPE, WEIGHTS
from krona_hub.sources.download import git_sha1_of
from krona_hub.sources.repo_listing import RemoteFile
from krona_hub.sources.safe_names import printable

Action = Literal["add", "update", "same", "delete"]
LARGE = (".safetensors", ".png", ".jpg", ".jpeg", ".webp", ".sig")  # stored outside git on the Hub


class PushRow(NamedTuple):
    """One file of a push."""

    file: str
    size: int  # bytes; 0 for a deleted file
    action: Action
    transport: str  # "git", "lfs" or "xet"; "" if nothing is sent


@dataclass(frozen=True)
class PushPlan:
    """A push that is not executed yet."""

    repo: str
    revision: str
    parent: str | None  # parent commit; None if the repository has to be created
    visibility: str  # "public", "private" or "as it is"
    rows: tuple[PushRow, ...]
    create_pr: bool = False
    tag: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_new(self) -> bool:
        """Whether the repository is, or was, created by this push."""
        return self.visibility in ("public", "private")

    @property
    def changes(self) -> tuple[PushRow, ...]:
        return tuple(r for r in self.rows if r.action != "same")

    @property
    def bytes_to_send(self) -> int:
        return sum(r.size for r in self.changes)


def rows_of(paths: Mapping[str, Path], deleted: tuple[str, ...], there: RepoState, xet: bool) -> tuple[PushRow, ...]:
    """Return the rows of a push; a file that the repository holds with the same digest is `same`."""
    files = there.listing.files if there.listing else {}
    rows = [_row(name, path, files.get(name), xet) for name, path in sorted(paths.items())]
    return (*rows, *(PushRow(name, 0, "delete", "git") for name in deleted))


def _row(name: str, path: Path, known: RemoteFile | None, xet: bool) -> PushRow:
    size = path.stat().st_size
    transport = ("xet" if xet else "lfs") if name.endswith(LARGE) else "git"
    if known is None:
        return PushRow(name, size, "add", transport)
    return PushRow(name, size, "same", "") if is_same(path, known) else PushRow(name, size, "update", transport)


def is_same(path: Path, known: RemoteFile) -> bool:
    """Whether the local file and the remote file are the same."""
    if known.size != path.stat().st_size:
        return False
    return file_sha256_once(path) == known.sha256 if known.sha256 else git_sha1_of(path) == known.git_sha1


def check_repository(there: RepoState, base_model: str) -> None:
    """Raise ConflictError if the repository holds anything but a krona adapter for this base model."""
    if there.listing is None:
        return
    others = [n for n in there.listing.files if n not in (".gitattributes", ".gitignore", "LICENSE", CARD)]
    if not others:
        return
    fix = "Choose another repository, or use --force to add the adapter to its contents."
    if there.config is None or there.config.get("model_type") != MODEL_TYPE:
        name = printable(next((n for n in others if n not in (CONFIG, MANIFEST, WEIGHTS)), others[0]))
        raise ConflictError(f"{there.listing.repo} contains other files, such as {name}.", fix=fix)
    theirs = there.config.get("base_model")
    if theirs != base_model:
        cause = f"{there.listing.repo} contains an adapter for {printable(str(theirs))}; this one is for {base_model}."
        raise ConflictError(cause, fix=fix)
