"""The plan: the images and the files they need, resolved before torch is imported, so that errors show at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krona_hub.bases.loading import load_base
from krona_hub.bases.weight_files import header_of_model
from krona_hub.checkpoints.digest import file_sha256
from krona_hub.checkpoints.file_names import SAFETENSORS
from krona_hub.errors import FormatError, IncompleteError, KronaError, UnknownBaseError, UsageError
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.description import Description
from krona_hub.images.grid_cells import Column, GridRow, columns_of, names_of, rows_of
from krona_hub.images.request import GenerateRequest
from krona_hub.pipelines.opening import missing_base_error, pipeline_for
from krona_hub.sources import PIPELINE, resolve, resolve_base

PREFERRED = {"tiny-scenes": (20, 3.0), "flux1-schnell": (4, 0.0)}  # family -> suitable steps and guidance


@dataclass(frozen=True)
class BasePlan:
    """A base with its weights."""

    source: str  # as given
    path: Path  # a diffusers folder or a checkpoint file
    pipeline: str | None  # diffusers class; None for a single file with --config
    family: str | None  # name in the catalog
    fingerprint: str | None  # sha256 of its layer names and shapes

    @property
    def preferred(self) -> tuple[int | None, float | None]:
        """Default steps and guidance; None leaves the default to the diffusers pipeline."""
        return PREFERRED.get(self.family or "", (None, None))


@dataclass(frozen=True)
class ImageAdapter:
    """An adapter that will be loaded."""

    name: str  # in labels
    source: str  # as given
    path: Path
    weight: float
    format: str
    sha256: str
    trigger_words: tuple[str, ...]


@dataclass(frozen=True)
class GeneratePlan:
    """The images to generate: every column in every row."""

    request: GenerateRequest
    bases: tuple[BasePlan, ...]
    adapters: tuple[ImageAdapter, ...]
    columns: tuple[Column, ...]
    rows: tuple[GridRow, ...]

    def base(self, source: str) -> BasePlan:
        return next(base for base in self.bases if base.source == source)

    @property
    def count(self) -> int:
        return len(self.columns) * len(self.rows)

    @property
    def notes(self) -> tuple[str, ...]:
        """Hints about a likely mistake: trigger words that no prompt contains."""
        prompts = " ".join(self.request.prompts).lower()
        return tuple(
            f"{adapter.name} has the trigger words {', '.join(adapter.trigger_words)!r}; no prompt contains any."
            for adapter in self.adapters
            if adapter.trigger_words and not any(word.lower() in prompts for word in adapter.trigger_words)
        )


def make_plan(request: GenerateRequest) -> GeneratePlan:
    """Find and describe every file. Raises what `resolve_base`, `resolve` and `describe` raise."""
    bases = tuple(
        base_plan(source, request.variant, request.config) for source in dict.fromkeys((request.base, *request.beside))
    )
    names = names_of([source for source, _ in request.adapters])
    adapters = tuple(_adapter(n, s, w, request.base) for n, (s, w) in zip(names, request.adapters, strict=True))
    return GeneratePlan(request, bases, adapters, columns_of(request, names), rows_of(request))


# --- bases -----------------------------------------------------------------------------------------------------------


def base_plan(source: str, variant: str | None = None, config: str | None = None) -> BasePlan:
    """Find the weights of a base model. Raises what `resolve_base` raises, and UnknownBaseError without weights."""
    path = resolve_base(source)
    if not path.exists():
        raise missing_base_error(source)
    if path.is_file():
        header_of_model(path)  # rejects anything but safetensors: pickles are never opened
    elif variant:
        _check_variant(path, variant)
    family, fingerprint = _identity(path)
    if path.is_dir():
        pipeline: str | None = _pipeline_class(path)
    else:
        pipeline = None if config else pipeline_for(source, family)
    return BasePlan(source, path, pipeline, family, fingerprint)


def _pipeline_class(folder: Path) -> str:
    index = folder / PIPELINE
    if not index.exists():
        files = sorted(folder.glob(f"*{SAFETENSORS}"))
        fix = f"Specify the file itself: {files[0]}." if files else "Specify the folder above it."
        raise UnknownBaseError(f"{folder} is not a pipeline: it contains no {PIPELINE}.", fix=fix)
    try:
        content: Any = json.loads(index.read_text("utf-8"))
        name = str(content["_class_name"])
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{index} does not name a pipeline.", fix="Download it again.") from error
    absent = [n for n, part in content.items() if isinstance(part, list) and any(part) and not (folder / n).is_dir()]
    if absent:
        raise IncompleteError(
            f"{folder} lacks {', '.join(absent)}, which {name} needs.", fix="Download these folders, too."
        )
    return name


def _check_variant(folder: Path, variant: str) -> None:
    names = [path.name for path in folder.glob(f"*/*{SAFETENSORS}")]
    if any(f".{variant}." in name or f".{variant}-" in name for name in names):
        return
    there = sorted({name.split(".")[1].split("-")[0] for name in names if name.count(".") > 1})
    fix = f"Use --variant {' or '.join(there)}." if there else "Omit --variant: this base has only one."
    raise UsageError(f"{folder} has no variant {variant!r}.", fix=fix)


def _identity(path: Path) -> tuple[str | None, str | None]:
    """Return the catalog name and the fingerprint of a base; (None, None) if it has no layers to adapt."""
    try:
        base = load_base(path)
    except KronaError:
        return None, None
    return base.family, base.fingerprint


# --- adapters --------------------------------------------------------------------------------------------------------


def _adapter(name: str, source: str, weight: float, base: str) -> ImageAdapter:
    path = resolve(source)
    about = _described(path, base)
    return ImageAdapter(name, source, path, weight, about.format, adapter_sha256(path), about.trigger_words)


def _described(path: Path, base: str) -> Description:
    """Describe a file with the key names of the base, or on its own if the base is unknown."""
    try:
        return describe(path, base=resolve_base(base))
    except UnknownBaseError:
        return describe(path)


def adapter_sha256(path: Path) -> str:
    """Hash a file, or the lines `sha256 name` of a folder's weights and configurations."""
    if path.is_file():
        return file_sha256(path)
    from hashlib import sha256

    parts = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in (SAFETENSORS, ".json"))
    return sha256("".join(f"{file_sha256(p)} {_name(p, path)}\n" for p in parts).encode()).hexdigest()


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def small_files(path: Path, most: int = 1_000_000) -> dict[str, str]:
    """Return file -> sha256 for the base's files of at most `most` bytes: configurations and vocabularies."""
    return {_name(p, path): file_sha256(p) for p in _files(path) if p.stat().st_size <= most}


def base_digest(path: Path, most: int = 64_000_000) -> str:
    """Hash a base: names and sizes of its files, and the contents of those of at most `most` bytes."""
    from hashlib import sha256

    lines = [(_name(p, path), p.stat().st_size, p) for p in _files(path)]
    entries = (f"{name} {size} {file_sha256(p) if size <= most else ''}\n" for name, size, p in lines)
    return sha256("".join(entries).encode()).hexdigest()


def _files(path: Path) -> Sequence[Path]:
    """The files of a base: weights, configurations and vocabularies, without images and cards."""
    kinds = (SAFETENSORS, ".json", ".txt", ".model")
    if path.is_file():
        return [path]
    return [*sorted(p for p in path.glob("*/*") if p.is_file() and p.suffix in kinds), path / PIPELINE]
