"""The trained adapter as a value, with the record of how it came to be."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from krona_hub.adapters.adapter import Adapter, BaseModel, Provenance
from krona_hub.adapters.provenance import creator
from krona_hub.bases.base import Base
from krona_hub.layers import extract_adapter
from krona_hub.training.settings import TrainingSettings

ELSEWHERE = ("output", "device", "data", "validation_data", "prior_data", "init", "trackers")  # no part of a result
UNTOLD = ("base", "licence", *ELSEWHERE)  # of the settings, in the file


def trained_adapter(pipe: Any, base: Base, settings: TrainingSettings, facts: dict[str, Any]) -> Adapter:
    """The adapter in the pipeline as it is now. Equal trainings give equal values: no times, no places."""
    adapter = extract_adapter(pipe)
    words = (settings.trigger_word,) if settings.trigger_word else ()
    origin = Provenance(
        created_by=creator(),
        method="trained",
        training={**recorded(settings), **facts},
        licence=settings.licence,
        trigger_words=words,
    )
    model = BaseModel(base.family, base.hub_id, None, base.fingerprint, base.candidates)
    return replace(adapter, base=model, provenance=origin)


def recorded(settings: TrainingSettings) -> dict[str, Any]:
    """The settings that differ from their defaults and belong to the result; as JSON holds them."""
    usual = TrainingSettings()
    told = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in UNTOLD}
    changed = {name: value for name, value in told.items() if value != getattr(usual, name)}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in changed.items()}
    return {"steps": settings.steps, "seed": settings.seed, "learning_rate": settings.learning_rate, **plain}


def base_name(settings: TrainingSettings) -> str:
    """The base for a person: a Hub id as it is, a path without the folders above it."""
    path = Path(settings.base)
    return path.name if path.exists() else settings.base
