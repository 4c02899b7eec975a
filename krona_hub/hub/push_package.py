"""The files of a push, prepared in a folder: weights, config, manifest, card, exports and images."""

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
from krona_hub.hub.sample_images import SAMPLE, collect_images, last_samples, plot_loss, run_of
from krona_hub.sources.repo_listing import Listing


@dataclass(frozen=True)
class PushOptions:
    """What to push besides the weights."""

    with_lora: int | bool = False  # True: exact; an integer: its rank
    with_lokr: bool = False
    images: Path | None = None
    card: bool = True
    card_only: bool = False
    base: str | Path | None = None  # needed if the catalog does not know the key names


@dataclass(frozen=True)
class PushPackage:
    """The contents of a push, except card and manifest, which depend on the state of the repository."""

    adapter: LocalAdapter
    options: PushOptions
    folder: Path
    paths: Mapping[str, Path]  # name in the repository -> local file
    entries: Mapping[str, ManifestEntry]
    exports: tuple[Mapping[str, Any], ...]
    samples: tuple[CardSample, ...]


@dataclass(frozen=True)
class RepoState:
    """The state of the repository before a push."""

    listing: Listing | None = None  # None if the repository does not exist yet
    card: str | None = None
    manifest: Manifest = field(default_factory=lambda: Manifest({}))
    document: Mapping[str, Any] = field(default_factory=dict)  # the manifest as JSON
    config: Mapping[str, Any] | None = None


def pack(adapter: LocalAdapter, folder: Path, options: PushOptions) -> PushPackage:
    """Prepare everything that does not depend on the state of the repository in `folder`."""
    exports = make_exports(adapter, folder, options.with_lora, options.with_lokr, options.base)
    run = run_of(adapter.source)
    plots = plot_loss(run, folder) if run else ()
    images = collect_images(options.images, folder) if options.images else last_samples(run, folder) if run else ()
    (folder / CONFIG).write_text(_json(config(adapter)))
    names = [*(e.name for e in exports), *plots, *(i.name for i in images), CONFIG]
    paths = {WEIGHTS: adapter.path, **{name: folder / name for name in names}}
    entries = {
        name: ManifestEntry(path.stat().st_size, file_sha256_once(path))
        for name, path in paths.items()
        if name != WEIGHTS
    }
    entries[WEIGHTS] = ManifestEntry(adapter.size, adapter.sha256)
    samples = tuple(CardSample(i.name, i.prompt) for i in images)
    return PushPackage(adapter, options, folder, paths, entries, tuple(e.document() for e in exports), samples)


def finish(package: PushPackage, repo: str, there: RepoState) -> tuple[Mapping[str, Path], tuple[str, ...]]:
    """Write card and manifest for the state `there`; return (name -> file after the push, names to delete)."""
    package = _without_run_samples(package, there)
    kept = _kept(package, there)
    deleted = tuple(
        sorted(n for n in there.manifest.files if n not in kept and n not in package.paths and _is_there(n, there))
    )
    entries = {**kept, **package.entries}
    exports = (*package.exports, *_old_exports(kept, there))
    samples = package.samples or _old_samples(kept, there)
    facts = card_facts(repo, package.adapter, entries, samples, exports)
    paths = dict(package.paths)
    if package.options.card:
        before = there.manifest
        text = render(facts, there.card, generated_before=before.card, sections_before=before.sections)
        (package.folder / CARD).write_text(text, encoding="utf-8")
        paths[CARD] = package.folder / CARD
    known = manifest_facts(package.adapter, exports) | {
        "samples": [{"file": s.file, "prompt": s.prompt} for s in samples]
    }
    before = there.manifest
    written = (front_matter(facts), tuple(sections(facts))) if package.options.card else (before.card, before.sections)
    record = Manifest(entries, known, *written)
    (package.folder / MANIFEST).write_text(record.text(), encoding="utf-8")
    paths[MANIFEST] = package.folder / MANIFEST
    return paths, deleted


def _without_run_samples(package: PushPackage, there: RepoState) -> PushPackage:
    """Drop the samples of the training run if the repository has images that its owner chose."""
    known = [s.get("file") for s in there.document.get("samples") or [] if isinstance(s, Mapping)]
    chosen = [n for n in known if isinstance(n, str) and not n.startswith(SAMPLE) and _is_there(n, there)]
    ours = [s.file for s in package.samples if s.file.startswith(SAMPLE)]
    if not chosen or not ours:
        return package
    paths = {name: path for name, path in package.paths.items() if name not in ours}
    return replace(package, paths=paths, entries={n: package.entries[n] for n in paths}, samples=())


def _kept(package: PushPackage, there: RepoState) -> dict[str, ManifestEntry]:
    """Files of an earlier push that stay: images unless there are new ones, exports and plots if the weights are equal.

    Taken as they are on the Hub now: the owner may have replaced one on the web.
    """
    same = there.manifest.files.get(WEIGHTS) == package.entries[WEIGHTS]
    kept = {}
    for name, entry in there.manifest.files.items():
        stays = same if name in EXPORTS or name.startswith(PLOTS) else name.startswith(IMAGES) and not package.samples
        if stays and name not in package.paths and _is_there(name, there):
            now = there.listing.files[name] if there.listing else None
            kept[name] = ManifestEntry(now.size, now.sha256) if now and now.sha256 and now.size else entry
    return kept


def _is_there(name: str, there: RepoState) -> bool:
    """Whether a file of the manifest is in the repository, under a name that krona writes."""
    return there.listing is not None and name in there.listing.files and is_ours(name)


def _old_exports(kept: Mapping[str, ManifestEntry], there: RepoState) -> list[Mapping[str, Any]]:
    known = there.document.get("exports") or []
    return [e for e in known if isinstance(e, Mapping) and e.get("name") in kept]


def _old_samples(kept: Mapping[str, ManifestEntry], there: RepoState) -> tuple[CardSample, ...]:
    known = [s for s in there.document.get("samples") or [] if isinstance(s, Mapping)]
    return tuple(CardSample(str(s["file"]), str(s.get("prompt", ""))) for s in known if s.get("file") in kept)


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
