"""The adapter on this disk that is to be pushed: sound, of known size, and with a base that the Hub can name."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from krona_hub.adapters.provenance import BaseModel, Provenance, native_provenance
from krona_hub.bases import catalogue
from krona_hub.checkpoints.digest import file_sha256_once
from krona_hub.checkpoints.header import Header
from krona_hub.errors import ResourceError, UsageError
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.description import Description
from krona_hub.hub.repo_layout import MAX_FILE, MAX_HEADER, MAX_TENSORS
from krona_hub.rendering.humanize import human_bytes
from krona_hub.schema.tensor_layout import examine
from krona_hub.sources import resolve
from krona_hub.verification import validate
from krona_hub.verification.soundness import ValidationReport

_NO_BASE = "the file does not say which base it is for."
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class LocalAdapter:
    """A native adapter file that has passed every check."""

    path: Path  # of the native file
    source: Path  # what the user named; the same, unless it was of another format
    description: Description
    base: BaseModel
    base_model: str  # its Hub id
    provenance: Provenance
    sha256: str

    @property
    def size(self) -> int:
        return self.description.bytes


def check_adapter(source: str | Path, scratch: Path, base_model: str | None, base: str | Path | None) -> LocalAdapter:
    """Validate an adapter; one of another format is rewritten natively in `scratch`, with the same ΔW.

    Raises the first finding of `validate`, ResourceError beyond the limits, UsageError without a Hub id of the base.
    """
    given = resolve(source)
    path, description = given, describe(given, base=base)
    if description.format != "krona":
        path = _native(description, scratch, base)
        description = describe(path)
    report, sha256 = _validated(path)
    if report.errors:
        raise report.errors[0].error().within(str(given))
    check_limits(description.header)
    known, _ = examine(description.header)
    fitted = known.header.base or BaseModel()
    return LocalAdapter(
        path=path,
        source=given,
        description=description,
        base=fitted,
        base_model=base_model_id(fitted, base_model),
        provenance=known.provenance(description.header.metadata),
        sha256=sha256,
    )


def _validated(path: Path) -> tuple[ValidationReport, str]:
    """What is wrong with a file, and its sha256: hashed while its numbers are looked at."""
    with ThreadPoolExecutor(1) as beside:
        digest = beside.submit(file_sha256_once, path)
        return validate(path), digest.result()


def _native(about: Description, scratch: Path, base: str | Path | None) -> Path:
    from krona_hub.formats.reading.reader import read_described
    from krona_hub.formats.writing.writer import write

    path, adapter = scratch / "native.safetensors", read_described(about)
    write(replace(adapter, provenance=native_provenance(about.path, adapter.provenance)), path, base=base)
    return path


def check_limits(header: Header, max_size: int = MAX_FILE) -> None:
    """Raise ResourceError for what is too large to be an adapter."""
    if header.file_size > max_size:
        size = human_bytes(header.file_size)
        raise ResourceError(f"the adapter has {size}; the limit is {human_bytes(max_size)}.", fix="Raise --max-size.")
    if header.data_start > MAX_HEADER:
        raise ResourceError(f"its header has {human_bytes(header.data_start)}.", fix="No adapter needs that: check it.")
    if len(header.tensors) > MAX_TENSORS:
        raise ResourceError(f"it has {len(header.tensors):,} tensors.", fix="No adapter needs that: check it.")


def base_model_id(base: BaseModel, asked: str | None) -> str:
    """The Hub id of the base: the one asked for, the file's, or the catalogue's.

    Raises UsageError where none is known, or where it is a path: other people do not have that.
    """
    family = catalogue.get(base.family).hub_id if base.family in catalogue.names() else None
    name = asked or base.hub_id or family
    if name is None:
        known = f"the adapter is for {base.family}, of which no Hub id is known." if base.family else _NO_BASE
        raise UsageError(known, fix="Name it as others find it: --base-model ns/name.")
    if not HUB_NAME.fullmatch(name) or Path(name).expanduser().exists():
        raise UsageError(
            f"the base {name!r} is no model on the Hub.", fix="Name it as others find it: --base-model ns/name."
        )
    return name
