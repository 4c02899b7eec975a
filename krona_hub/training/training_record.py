"""The trained adapter as a value, with the provenance of its training."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from krona_hub.adapters.adapter import Adapter, BaseModel, Provenance
from krona_hub.adapters.provenance import creator
from krona_hub.bases.base import Base
from krona_hub.layers import extract_adapter
from krona_hub.training.settings import TrainingSettings

LOCAL_SETTINGS = (
    "output",
    "device",
    "data",
    "validation_data",
    "prior_data",
    "init",
    "trackers",
)  # not part of the result
NOT_RECORDED = ("base", "licence", *LOCAL_SETTINGS)  # settings left out of the adapter file


def trained_adapter(pipe: Any, base: Base, settings: TrainingSettings, facts: dict[str, Any]) -> Adapter:
    """Return the current adapter of the pipeline. It contains no times or paths, so equal runs give equal values."""
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
    """Return the settings that affect the result and differ from their defaults, as JSON values."""
    defaults = TrainingSettings()
    values = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in NOT_RECORDED}
    changed = {name: value for name, value in values.items() if value != getattr(defaults, name)}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in changed.items()}
    return {"steps": settings.steps, "seed": settings.seed, "learning_rate": settings.learning_rate, **plain}


def base_name(settings: TrainingSettings) -> str:
    """Return the display name of the base model: its Hub id, or the last part of its path."""
    path = Path(settings.base)
    return path.name if path.exists() else settings.base
