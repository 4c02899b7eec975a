"""The base model and the provenance of an adapter, as plain values. Torch-free, as reading headers is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from krona_hub.checkpoints.digest import file_sha256
from krona_hub.checkpoints.file_names import PEFT_WEIGHTS
from krona_hub.version import __version__

DENOISERS = ("unet", "transformer", "prior", "decoder")  # Stable Cascade has the last two
CONDITIONER = "text_conditioner"  # between the text encoder and the transformer of Anima
COMPONENTS = (*DENOISERS, CONDITIONER, "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


def creator() -> str:
    """Return the `created_by` value of new files."""
    return f"krona_hub {__version__}"


@dataclass(frozen=True)
class BaseModel:
    """The base model of an adapter, as a plain value; every field may be unknown.

    Parameters
    ----------
    family, hub_id, revision : str, optional
        Catalog name, such as ``sdxl``; Hub id, such as ``stabilityai/stable-diffusion-xl-base-1.0``; Hub revision.
    fingerprint : str, optional
        SHA-256 of the sorted canonical ``name shape`` lines of the base model.
    candidates : tuple of str, default ()
        Catalog names that fit equally well.

    Examples
    --------
    >>> BaseModel("sd21", candidates=("sd21", "sd21-base")).names
    ('sd21', 'sd21-base')
    """

    family: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    candidates: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All possible catalog names, the most likely first."""
        return tuple(dict.fromkeys((*([self.family] if self.family else []), *self.candidates)))

    @property
    def is_certain(self) -> bool:
        """Whether exactly one catalog name is possible."""
        return len(self.names) == 1

    @property
    def words(self) -> str:
        """A description for messages."""
        return self.family or self.hub_id or f"a base model with fingerprint {(self.fingerprint or 'unknown')[:12]}"

    def agrees_with(self, other: BaseModel) -> bool:
        """Return whether both may be the same base model; unknown fields agree with everything.

        Names take precedence over fingerprints: an inpainting U-Net has another fingerprint than its family.

        >>> BaseModel("sd21", candidates=("sd21", "sd21-base")).agrees_with(BaseModel("sd21-base"))
        True
        """
        if self.fingerprint and self.fingerprint == other.fingerprint:
            return True
        if self.names and other.names:
            return bool({*self.names} & {*other.names})
        return not (self.fingerprint and other.fingerprint)


@dataclass(frozen=True)
class Provenance:
    """The origin of an adapter, and the errors measured during its conversion."""

    created_by: str | None = None
    source_format: str | None = None  # a name of FORMATS
    source_sha256: str | None = None
    method: str | None = None
    relative_error: float | None = None  # overall, Frobenius norm
    layer_errors: Mapping[str, float] = field(default_factory=dict)  # layer name -> relative error
    training: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    trigger_words: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the file that it was read from
    unknown: Mapping[str, Any] = field(default_factory=dict)  # header fields of newer minor versions
    skipped: tuple[str, ...] = ()  # modules of the file that were not read, layers left out; never stored
    skipped_vectors: tuple[str, ...] = ()  # vectors of the file that were not read; never stored
    warnings: tuple[str, ...] = ()  # of the reader about the whole file; never stored
    notes: tuple[str, ...] = ()  # messages of the reader of the file; never stored


def native_provenance(source: Path, known: Provenance) -> Provenance:
    """Return the provenance of a native file converted from `source`: adds its sha256 and this krona version.

    For a PEFT folder the sha256 is that of its weights; for a folder of several components it is None.
    """
    weights = source / PEFT_WEIGHTS if source.is_dir() else source
    sha256 = file_sha256(weights) if weights.is_file() else None
    return replace(known, created_by=creator(), source_sha256=sha256)
