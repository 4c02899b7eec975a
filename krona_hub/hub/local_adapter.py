"""The local adapter to push: validated, within the limits, and with a base model that has a Hub id."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from krona_hub.adapters.provenance import BaseModel, Provenance, native_provenance
from krona_hub.bases import catalog
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

_NO_BASE = "The file does not name its base model."
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class LocalAdapter:
    """A native adapter file that passed every check."""

    path: Path  # the native file
    source: Path  # as given by the user; differs from `path` if it has another format
    description: Description
    base: BaseModel
    base_model: str  # Hub id
    provenance: Provenance
    sha256: str

    @property
    def size(self) -> int:
        return self.description.bytes


def check_adapter(source: str | Path, scratch: Path, base_model: str | None, base: str | Path | None) -> LocalAdapter:
    """Validate an adapter; one in another format is rewritten in the native format in `scratch`, with the same ΔW.

    Raises the first error of `validate`, ResourceError beyond the limits, UsageError if the base has no Hub id.
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
    """Validate a file and compute its sha256 at the same time."""
    with ThreadPoolExecutor(1) as executor:
        digest = executor.submit(file_sha256_once, path)
        return validate(path), digest.result()


def _native(about: Description, scratch: Path, base: str | Path | None) -> Path:
    from krona_hub.formats.reading.reader import read_described
    from krona_hub.formats.writing.writer import write

    path, adapter = scratch / "native.safetensors", read_described(about)
    write(replace(adapter, provenance=native_provenance(about.path, adapter.provenance)), path, base=base)
    return path


def check_limits(header: Header, max_size: int = MAX_FILE) -> None:
    """Raise ResourceError for a file that is too large to be an adapter."""
    if header.file_size > max_size:
        size = human_bytes(header.file_size)
        raise ResourceError(f"The adapter is {size}; the limit is {human_bytes(max_size)}.", fix="Raise --max-size.")
    fix = "Check the file: no adapter needs that."
    if header.data_start > MAX_HEADER:
        raise ResourceError(f"The adapter has a header of {human_bytes(header.data_start)}.", fix=fix)
    if len(header.tensors) > MAX_TENSORS:
        raise ResourceError(f"The adapter has {len(header.tensors):,} tensors.", fix=fix)


def base_model_id(base: BaseModel, requested: str | None) -> str:
    """Return the Hub id of the base model: the requested one, the file's, or the catalog's.

    Raises UsageError if none is known, or if it is a local path, which other people do not have.
    """
    family = catalog.get(base.family).hub_id if base.family in catalog.names() else None
    name = requested or base.hub_id or family
    if name is None:
        known = f"No Hub id is known for the base model {base.family}." if base.family else _NO_BASE
        raise UsageError(known, fix="Specify its Hub id: --base-model ns/name.")
    if not HUB_NAME.fullmatch(name) or Path(name).expanduser().exists():
        raise UsageError(
            f"The base model {name!r} is not a model on the Hub.", fix="Specify its Hub id: --base-model ns/name."
        )
    return name
