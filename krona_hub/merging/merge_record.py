"""Metadata of a merged file: the adapters, the base and the strengths. Torch-free.

ModelSpec 1.0.0: https://github.com/Stability-AI/ModelSpec. No date, so that equal input gives equal bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krona_hub.bases.base import Base
from krona_hub.schema.modelspec import ARCHITECTURES, PREFIX

RECORD = "krona.merge"
DATA_HASH = f"{PREFIX}hash_sha256"
SMALL = 256_000_000  # bytes that are hashed by default
_BLOB = re.compile(r"[0-9a-f]{64}")
_ABOUT_BYTES = (f"{PREFIX}hash_", "sshs_")  # valid only for the bytes of the base


@dataclass(frozen=True)
class RecordedAdapter:
    """An adapter in the record."""

    name: str
    sha256: str | None  # None for one in memory
    format: str | None
    weight: float


@dataclass(frozen=True)
class Recipe:
    """Input and options of a merge."""

    base: str  # name of the file or folder
    adapters: tuple[RecordedAdapter, ...]
    options: Mapping[str, Any]  # those that differ from their defaults
    title: str | None
    version: str  # of krona_hub


def metadata_for(old: Mapping[str, str], recipe: Recipe, base: Base, sha256: str | None) -> dict[str, str]:
    """Return the metadata of a merged file: what remains valid of the base, the record, and the ModelSpec keys.

    `sha256` is that of the base file, if known.
    """
    kept = {k: v for k, v in old.items() if not k.startswith(_ABOUT_BYTES)}
    names = [Path(x.name).stem for x in recipe.adapters]
    title = recipe.title or " + ".join([old.get(f"{PREFIX}title") or Path(recipe.base).stem, *names])
    merged_from = [recipe.base, *(Path(x.name).name for x in recipe.adapters)]
    spec = {
        "sai_model_spec": "1.0.0",
        "title": title,
        "merged_from": ", ".join(merged_from),
        **_architecture(old, base),
    }
    record = json.dumps(_record(recipe, old, base, sha256), sort_keys=True, ensure_ascii=False)
    return {"format": "pt"} | kept | {PREFIX + key: value for key, value in spec.items()} | {RECORD: record}


def _architecture(old: Mapping[str, str], base: Base) -> dict[str, str]:
    known = ARCHITECTURES.get(base.family, base.family) if base.family else None
    architecture = old.get(f"{PREFIX}architecture") or known
    return {"architecture": architecture} if architecture else {}


def _record(recipe: Recipe, old: Mapping[str, str], base: Base, sha256: str | None) -> dict[str, Any]:
    record: dict[str, Any] = {
        "version": recipe.version,
        "base": _present(name=recipe.base, family=base.family, fingerprint=base.fingerprint, sha256=sha256),
        "adapters": [_present(name=x.name, sha256=x.sha256, format=x.format, weight=x.weight) for x in recipe.adapters],
        **recipe.options,
    }
    if RECORD in old:
        record["before"] = old[RECORD]  # of a base that is already a merge
    return record


def _present(**facts: Any) -> dict[str, Any]:
    return {name: fact for name, fact in facts.items() if fact is not None}


def known_sha256(path: Path) -> str | None:
    """Return the sha256 of a file in the Hub cache, by its name, else None. Nothing is read."""
    real = path.resolve()
    return real.name if path.is_symlink() and real.parent.name == "blobs" and _BLOB.fullmatch(real.name) else None


def is_small(paths: Sequence[Path]) -> bool:
    """Return whether hashing the files takes negligible time."""
    return sum(path.stat().st_size for path in paths) <= SMALL
