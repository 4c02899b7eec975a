"""Where an adapter belongs and where it comes from, as plain values. Torch-free: headers are read without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from krona_hub.checkpoints.digest import file_sha256
from krona_hub.checkpoints.file_names import PEFT_WEIGHTS
from krona_hub.version import __version__


def creator() -> str:
    """What `created_by` says of a file that is made now."""
    return f"krona_hub {__version__}"


@dataclass(frozen=True)
class BaseModel:
    """Which base an adapter belongs to, as a plain value; every field may be unknown."""

    family: str | None = None  # catalogue name, such as "sdxl"
    hub_id: str | None = None  # such as "stabilityai/stable-diffusion-xl-base-1.0"
    revision: str | None = None
    fingerprint: str | None = None  # sha256 of the base's sorted canonical `name shape` lines
    candidates: tuple[str, ...] = ()  # catalogue names that fit equally well

    @property
    def names(self) -> tuple[str, ...]:
        """Every catalogue name that it may be, the likeliest first."""
        return tuple(dict.fromkeys((*([self.family] if self.family else []), *self.candidates)))

    @property
    def words(self) -> str:
        """What it is, for a message."""
        return self.family or self.hub_id or f"a base with fingerprint {(self.fingerprint or 'unknown')[:12]}"

    def agrees_with(self, other: BaseModel) -> bool:
        """Whether both may be the same base: what is unknown agrees with everything.

        Names count before fingerprints: an inpainting U-Net has another fingerprint than its family.

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
    """Where an adapter comes from, and what was measured on the way."""

    created_by: str | None = None
    source_format: str | None = None  # a name of FORMATS
    source_sha256: str | None = None
    method: str | None = None
    relative_error: float | None = None  # overall, Frobenius
    layer_errors: Mapping[str, float] = field(default_factory=dict)  # layer name -> relative error
    training: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    trigger_words: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the file it was read from
    unknown: Mapping[str, Any] = field(default_factory=dict)  # header fields of newer minor versions, kept
    notes: tuple[str, ...] = ()  # what the reader of the file wants known; never stored


def native_provenance(source: Path, known: Provenance) -> Provenance:
    """The provenance of what was read from the foreign `source`, with its sha256 and the krona that writes it anew.

    A folder of PEFT stands for its weights; of several components none is the one.
    """
    weights = source / PEFT_WEIGHTS if source.is_dir() else source
    sha256 = file_sha256(weights) if weights.is_file() else None
    return replace(known, created_by=creator(), source_sha256=sha256)
