"""The files of a push, ready in a folder: weights, config, manifest, card, exports and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from krona_hub.checkpoints.digest import file_sha256_once
from krona_hub.hub.card_facts import card_facts, config, manifest_facts
from krona_hub.hub.exports import make_exports
from krona_hub.hub.local_adapter import LocalAdapter
from krona_hub.hub.manifest import Manifest, ManifestEntry
from krona_hub.hub.model_card import CardSample, front_matter, render, sections
from krona_hub.hub.repo_layout import CARD, CONFIG, EXPORTS, IMAGES, MANIFEST, PLOTS, WEIGHTS, is_ours
from krona_hub.hub.sample_images import SAMPLE, draw_curve, gather, last_samples, run_of
from krona_hub.sources.repo_listing import Listing


@dataclass(frozen=True)
class Wanted:
    """What goes into the repository beside the weights."""

    with_lora: int | bool = False  # True: exact; a number: its rank
    with_lokr: bool = False
    images: Path | None = None
    card: bool = True
    card_only: bool = False
    base: str | Path | None = None  # where names need one that no catalogue has


@dataclass(frozen=True)
class PushPackage:
    """What one push brings: everything but card and manifest, which depend on what is there already."""

    adapter: LocalAdapter
    wanted: Wanted
    folder: Path
    paths: Mapping[str, Path]  # name in the repository -> file here
    entries: Mapping[str, ManifestEntry]
    exports: tuple[Mapping[str, Any], ...]
    samples: tuple[CardSample, ...]


@dataclass(frozen=True)
class There:
    """What the repository holds already, as far as a push must know it."""

    listing: Listing | None = None  # None: there is no repository yet
    card: str | None = None
    manifest: Manifest = field(default_factory=lambda: Manifest({}))
    document: Mapping[str, Any] = field(default_factory=dict)  # the manifest as JSON
    config: Mapping[str, Any] | None = None


def pack(adapter: LocalAdapter, folder: Path, wanted: Wanted) -> PushPackage:
    """Put everything that does not depend on the repository into `folder`."""
    exports = make_exports(adapter, folder, wanted.with_lora, wanted.with_lokr, wanted.base)
    run = run_of(adapter.source)
    plots = draw_curve(run, folder) if run else ()
    pictures = gather(wanted.images, folder) if wanted.images else last_samples(run, folder) if run else ()
    (folder / CONFIG).write_text(_json(config(adapter)))
    made = [*(e.name for e in exports), *plots, *(p.name for p in pictures), CONFIG]
    paths = {WEIGHTS: adapter.path, **{name: folder / name for name in made}}
    entries = {
        name: ManifestEntry(path.stat().st_size, file_sha256_once(path))
        for name, path in paths.items()
        if name != WEIGHTS
    }
    entries[WEIGHTS] = ManifestEntry(adapter.size, adapter.sha256)
    samples = tuple(CardSample(p.name, p.prompt) for p in pictures)
    return PushPackage(adapter, wanted, folder, paths, entries, tuple(e.document() for e in exports), samples)


def finish(package: PushPackage, repo: str, there: There) -> tuple[Mapping[str, Path], tuple[str, ...]]:
    """(name -> file of all that is to be there, names that go away), with card and manifest written for `there`."""
    package = _modest(package, there)
    kept = _kept(package, there)
    gone = tuple(
        sorted(n for n in there.manifest.files if n not in kept and n not in package.paths and _is_there(n, there))
    )
    entries = {**kept, **package.entries}
    exports = (*package.exports, *_old_exports(kept, there))
    samples = package.samples or _old_samples(kept, there)
    facts = card_facts(repo, package.adapter, entries, samples, exports)
    paths = dict(package.paths)
    if package.wanted.card:
        before = there.manifest
        text = render(facts, there.card, generated_before=before.card, sections_before=before.sections)
        (package.folder / CARD).write_text(text, encoding="utf-8")
        paths[CARD] = package.folder / CARD
    known = manifest_facts(package.adapter, exports) | {
        "samples": [{"file": s.file, "prompt": s.prompt} for s in samples]
    }
    before = there.manifest
    written = (front_matter(facts), tuple(sections(facts))) if package.wanted.card else (before.card, before.sections)
    record = Manifest(entries, known, *written)
    (package.folder / MANIFEST).write_text(record.text(), encoding="utf-8")
    paths[MANIFEST] = package.folder / MANIFEST
    return paths, gone


def _modest(package: PushPackage, there: There) -> PushPackage:
    """The package without the samples of the training, where the repository has pictures that its owner chose."""
    known = [s.get("file") for s in there.document.get("samples") or [] if isinstance(s, Mapping)]
    chosen = [n for n in known if isinstance(n, str) and not n.startswith(SAMPLE) and _is_there(n, there)]
    ours = [s.file for s in package.samples if s.file.startswith(SAMPLE)]
    if not chosen or not ours:
        return package
    paths = {name: path for name, path in package.paths.items() if name not in ours}
    return replace(package, paths=paths, entries={n: package.entries[n] for n in paths}, samples=())


def _kept(package: PushPackage, there: There) -> dict[str, ManifestEntry]:
    """Files of an earlier push that stay: pictures unless new ones come, what the weights gave while they are the same.

    As the Hub holds them now: their owner may have exchanged one on the web.
    """
    same = there.manifest.files.get(WEIGHTS) == package.entries[WEIGHTS]
    kept = {}
    for name, entry in there.manifest.files.items():
        stays = same if name in EXPORTS or name.startswith(PLOTS) else name.startswith(IMAGES) and not package.samples
        if stays and name not in package.paths and _is_there(name, there):
            now = there.listing.files[name] if there.listing else None
            kept[name] = ManifestEntry(now.size, now.sha256) if now and now.sha256 and now.size else entry
    return kept


def _is_there(name: str, there: There) -> bool:
    """Whether a file that the manifest names is in the repository; only names of ours count."""
    return there.listing is not None and name in there.listing.files and is_ours(name)


def _old_exports(kept: Mapping[str, ManifestEntry], there: There) -> list[Mapping[str, Any]]:
    known = there.document.get("exports") or []
    return [e for e in known if isinstance(e, Mapping) and e.get("name") in kept]


def _old_samples(kept: Mapping[str, ManifestEntry], there: There) -> tuple[CardSample, ...]:
    known = [s for s in there.document.get("samples") or [] if isinstance(s, Mapping)]
    return tuple(CardSample(str(s["file"]), str(s.get("prompt", ""))) for s in known if s.get("file") in kept)


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
