"""Applications, their base models and the names that they find, as plain values. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from krona_hub.bases import catalog
from krona_hub.bases.base import Base
from krona_hub.bases.loading import load_base
from krona_hub.formats.compatibility.applications import (
    APPLICATIONS,
    NOT_KNOWN,
    Application,
    Evidence,
    FamilySupport,
)
from krona_hub.formats.compatibility.base_support import support_of
from krona_hub.formats.compatibility.naming import ComponentNamings
from krona_hub.formats.known.registry import FORMATS

GROUPS: Mapping[str, tuple[str, ...]] = {  # base models that most applications treat alike; the first stands for them
    "SD 1.5": ("sd15",),
    "SD 2.1": ("sd21",),
    "SDXL": ("sdxl",),
    "SD 3, 3.5": ("sd35-medium", "sd3-medium", "sd35-large"),
    "FLUX.1": ("flux1-dev", "flux1-schnell"),
    "FLUX.2": ("flux2-klein-4b", "flux2-klein-9b", "flux2-dev"),
    "Chroma": ("chroma",),
    "Z-Image": ("z-image",),
    "Qwen-Image": ("qwen-image",),
    "Wan 2.1, 2.2": ("wan21-t2v-14b", "wan22-i2v-a14b"),
    "HunyuanVideo": ("hunyuan-video",),
    "LTX-2": ("ltx-2.3",),
    "Lumina 2": ("lumina2",),
    "Krea 2": ("krea2",),
    "Anima": ("anima",),
    "HiDream I1": ("hidream-i1",),
    "AuraFlow": ("auraflow",),
    "PixArt-Σ": ("pixart-sigma-xl",),
    "Sana": ("sana-1600m",),
    "Ideogram 4": ("ideogram4",),
    "ERNIE-Image": ("ernie-image",),
    "Kandinsky 5": ("kandinsky5-lite-video",),
    "CogVideoX": ("cogvideox-5b",),
}


@dataclass(frozen=True)
class FamilyFacts:
    """Base models of an application with the same names."""

    bases: tuple[str, ...]
    lora: str  # yes, no or not known
    lokr: str
    names: Mapping[str, tuple[str, ...]]  # component -> namings, the one that is written first; prefix and spelling
    missing: Mapping[str, tuple[str, ...]]  # naming -> patterns of layers that it does not find
    note: str
    evidence: str


@dataclass(frozen=True)
class ApplicationFacts:
    """An application, as `krona tools` prints it."""

    name: str
    title: str
    kind: str
    aliases: tuple[str, ...]
    evidence: str
    writes: Mapping[str, str | None]  # kind of adapter -> format that is written for it
    reads: tuple[str, ...]  # formats
    other_bases: str  # what is known of base models that `families` does not list
    handling: Mapping[str, str]  # topic -> what it does
    families: tuple[FamilyFacts, ...]


def listed() -> tuple[ApplicationFacts, ...]:
    """Every application, in the order of the table."""
    return tuple(facts_of(application) for application in APPLICATIONS.values())


def facts_of(application: Application) -> ApplicationFacts:
    """The facts about one application.

    >>> facts = facts_of(APPLICATIONS["nunchaku"])
    >>> facts.writes["lora"], facts.writes["lokr"], facts.families[0].bases
    ('diffusers-lora', None, ('flux1-dev',))
    """
    return ApplicationFacts(
        name=application.name,
        title=application.title,
        kind=application.kind,
        aliases=application.aliases,
        evidence=cited(application.evidence),
        writes={"lora": application.lora, "lora with DoRA": application.dora, "lokr": application.lokr},
        reads=tuple(f.name for f in FORMATS if application.rejection(f.name) is None),
        other_bases=_other_bases(application),
        handling=application.facts,
        families=tuple(_family(family) for family in application.families),
    )


def for_base(base: str) -> dict[str, FamilyFacts | str]:
    """Application -> what it does with adapters of a base model, or why it loads none or that this is not known."""
    known = load_base(base)
    return {name: _of_base(application, known) for name, application in APPLICATIONS.items()}


def _of_base(application: Application, base: Base) -> FamilyFacts | str:
    support = support_of(application, base)
    if support is None:
        return "yes" if application.every_base else _other_bases(application)
    return _family(support)


def cited(evidence: Evidence) -> str:
    """The evidence in words, such as `run: 0.33.0 (783545f689a0), 2026-08-22`."""
    commit = f" ({evidence.commit})" if evidence.commit else ""
    return f"{evidence.how}: {evidence.version}{commit}, {evidence.date}"


def _other_bases(application: Application) -> str:
    if application.every_base:
        return "yes, every base model"
    return "no" if application.is_complete else NOT_KNOWN


def _answer(loads: bool | None) -> str:
    return NOT_KNOWN if loads is None else "yes" if loads else "no"


def _family(family: FamilySupport) -> FamilyFacts:
    names: dict[str, ComponentNamings] = dict(family.names)
    return FamilyFacts(
        bases=family.bases,
        lora=_answer(family.lora),
        lokr=_answer(family.lokr),
        names={component: tuple(map(str, known.namings)) for component, known in names.items()},
        missing={str(n): found for known in names.values() for n, found in known.missing.items()},
        note=family.note,
        evidence=cited(family.evidence),
    )


def matrix() -> dict[str, dict[str, str]]:
    """Group of base models -> application -> `LoRA, LoKr`, `LoRA`, `–` (none) or `?` (not known)."""
    return {
        title: {name: _cell(application, catalog.get(bases[0])) for name, application in APPLICATIONS.items()}
        for title, bases in GROUPS.items()
    }


def _cell(application: Application, base: Base) -> str:
    support = support_of(application, base)
    if application.every_base:
        return "LoRA, LoKr"
    if support is None:
        return "–" if application.is_complete else "?"
    kinds = [title for title, loads in (("LoRA", support.lora), ("LoKr", support.lokr)) if loads]
    return ", ".join(kinds) or ("?" if None in (support.lora, support.lokr) else "–")
