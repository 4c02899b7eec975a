"""Where an adapter belongs and where it comes from, as plain values. Torch-free: headers are read without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BaseModel:
    """Which base an adapter belongs to, as a plain value; every field may be unknown."""

    family: str | None = None  # catalogue name, such as "sdxl"
    hub_id: str | None = None  # such as "stabilityai/stable-diffusion-xl-base-1.0"
    revision: str | None = None
    fingerprint: str | None = None  # sha256 of the base's sorted canonical `name shape` lines
    candidates: tuple[str, ...] = ()  # catalogue names that fit equally well


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
