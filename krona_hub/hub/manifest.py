"""`krona_manifest.json`: what was published, file by file, so that a copy can be checked without the Hub."""

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
    """The manifest as values."""

    files: Mapping[str, ManifestEntry]
    facts: Mapping[str, Any] = field(default_factory=dict)  # parameters, base_model, training, conversion
    card: Mapping[str, Any] = field(default_factory=dict)  # front matter as it was generated
    sections: tuple[str, ...] = ()  # of the card as it was generated

    def text(self) -> str:
        """Deterministic JSON, so that pushing the same again changes nothing."""
        document = {
            "krona_manifest": VERSION,
            "tool": f"krona-hub {version('krona-hub')}",
            "files": {name: entry._asdict() for name, entry in self.files.items()},
            **self.facts,
            "card": {"front_matter": dict(self.card), "sections": list(self.sections)},
        }
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def parse(data: bytes) -> Manifest:
    """Read a manifest that anybody may have written. Raises IntegrityError where it is none."""
    try:
        document = strict_json.parse(data)
        files = {str(n): ManifestEntry(int(e["size"]), str(e["sha256"])) for n, e in document["files"].items()}
        card = document.get("card") or {}
        sections = tuple(map(str, card.get("sections", ())))
        return Manifest(files, {}, dict(card.get("front_matter", {})), sections)
    except (KronaError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{MANIFEST} is broken.", fix="Ask the owner to push again.") from error


def check(manifest: Manifest, names: Iterable[str], files: Mapping[str, RemoteFile], here: Mapping[str, Path]) -> None:
    """Raise IntegrityError where a file is not what the manifest says: by the sha256 that the Hub names.

    Files without one are compared by what is `here` of them, so that this goes before anything large is downloaded.
    """
    for name in names:
        entry, known = manifest.files.get(name), files[name]
        if name in UNLISTED:
            continue
        if entry is None and name.startswith((IMAGES, PLOTS)):
            continue  # a picture that the owner has added on the web
        if entry is None:
            raise IntegrityError(f"{printable(name)} is not in {MANIFEST}.", fix=_ASK)
        found = ManifestEntry(known.size or 0, known.sha256) if known.sha256 else _entry_of(here[name])
        if found != entry:
            raise IntegrityError(
                f"{printable(name)} is not the file that {MANIFEST} describes.",
                fix="The repository was changed after the push: ask its owner, or pull an earlier commit.",
            )


def _entry_of(path: Path) -> ManifestEntry:
    return ManifestEntry(path.stat().st_size, file_sha256(path))


_ASK = "Ask the owner to push again."
