"""`krona_manifest.json`: the published files and their digests, so that a copy can be checked without the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from krona_hub.checkpoints import strict_json
from krona_hub.checkpoints.digest import file_sha256
from krona_hub.errors import IntegrityError, KronaError
from krona_hub.hub.repo_layout import CARD, IMAGES, MANIFEST, PLOTS, SIGNATURE
from krona_hub.sources.repo_listing import RemoteFile
from krona_hub.sources.safe_names import printable

VERSION = 1
UNLISTED = (CARD, MANIFEST, SIGNATURE)  # the owner edits the card on the web; the others would name themselves


class ManifestEntry(NamedTuple):
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a manifest."""

    files: Mapping[str, ManifestEntry]
    facts: Mapping[str, Any] = field(default_factory=dict)  # parameters, base_model, training, conversion
    card: Mapping[str, Any] = field(default_factory=dict)  # front matter as generated
    sections: tuple[str, ...] = ()  # of the card as generated

    def text(self) -> str:
        """Return deterministic JSON, so that pushing the same again changes nothing."""
        document = {
            "krona_manifest": VERSION,
            "tool": f"krona-hub {version('krona-hub')}",
            "files": {name: entry._asdict() for name, entry in self.files.items()},
            **self.facts,
            "card": {"front_matter": dict(self.card), "sections": list(self.sections)},
        }
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def parse(data: bytes) -> Manifest:
    """Parse an untrusted manifest. Raises IntegrityError if it is invalid."""
    try:
        document = strict_json.parse(data)
        files = {str(n): ManifestEntry(int(e["size"]), str(e["sha256"])) for n, e in document["files"].items()}
        card = document.get("card") or {}
        sections = tuple(map(str, card.get("sections", ())))
        return Manifest(files, {}, dict(card.get("front_matter", {})), sections)
    except (KronaError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{MANIFEST} is invalid.", fix="Ask the owner to push again.") from error


def check(manifest: Manifest, names: Iterable[str], files: Mapping[str, RemoteFile], local: Mapping[str, Path]) -> None:
    """Raise IntegrityError if a file differs from the manifest, judged by the sha256 on the Hub.

    Files without one are compared by their `local` copy, so that the check runs before any large download.
    """
    for name in names:
        entry, known = manifest.files.get(name), files[name]
        if name in UNLISTED:
            continue
        if entry is None and name.startswith((IMAGES, PLOTS)):
            continue  # an image that the owner added on the web
        if entry is None:
            raise IntegrityError(f"{printable(name)} is not listed in {MANIFEST}.", fix=_ASK)
        found = ManifestEntry(known.size or 0, known.sha256) if known.sha256 else _entry_of(local[name])
        if found != entry:
            raise IntegrityError(
                f"{printable(name)} does not match {MANIFEST}.",
                fix="Ask the owner, or pull an earlier commit: the repository was changed after the push.",
            )


def _entry_of(path: Path) -> ManifestEntry:
    return ManifestEntry(path.stat().st_size, file_sha256(path))


_ASK = "Ask the owner to push again."
