"""Applications that load adapters: what each runs, which names it finds, and how it computes. Torch-free.

One file of `applications/` per application. Facts are `run` (its own code was run, and its deltas or names compared)
or `read` (in its source); `krona tools` prints them. What no file states is not known, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from krona_hub.errors import UsageError, one_of
from krona_hub.formats.compatibility.naming import ComponentNamings
from krona_hub.formats.forms.vector_kinds import Kinds

ORDER = (  # as listed to users
    "comfyui", "forge", "reforge", "a1111", "sdnext", "invokeai", "sdcpp", "nunchaku",
    "diffusers", "peft", "lycoris", "diffsynth",
    "kohya", "musubi", "onetrainer", "ai-toolkit", "simpletuner",
)  # fmt: skip
NO_NAMES: Mapping[str, ComponentNamings] = MappingProxyType({})
DEFAULT_REASONS = {  # formats that hardly any application reads
    "krona": "only krona_hub reads its native format",
    "peft-lora": "it does not read PEFT folders",
    "peft-lokr": "only PEFT reads PEFT LoKr folders",
    "peft-loha": "only PEFT reads PEFT LoHa folders",
    "diffusers-lokr": "the keys are module paths of diffusers models",
    "diffusekrona": "only DiffuseKronA itself reads this format",
    "cloneofsimo": "no current application reads modules identified by position",
}
NOT_KNOWN = "not known"
WITHOUT_FACTS = frozenset({"drawthings"})  # often asked about
Kind = Literal["lora", "lokr"]  # of an adapter


class Evidence(NamedTuple):
    """Where a fact comes from."""

    how: Literal["run", "read"]
    version: str
    commit: str
    date: str  # of the commit, or of the run of a release

    def __str__(self) -> str:
        return f"{self.how}: {self.version}, {self.date}" if self.version else f"{self.how}: {self.date}"


@dataclass(frozen=True, eq=False)
class FamilySupport:
    """Base models that an application runs, and the names that it finds for them."""

    bases: tuple[str, ...]
    evidence: Evidence
    lora: bool | None  # None: not known
    lokr: bool | None
    names: Mapping[str, ComponentNamings]  # denoiser, text_conditioner, text_encoder, … -> namings
    names_by_format: Mapping[str, Mapping[str, ComponentNamings]]  # of formats with other names
    rejected: Mapping[str, str]  # format -> why it loads none of it for these base models
    note: str = ""
    is_open: bool = False  # whether it finds other names, too, which are not stated

    def names_for(self, format_name: str) -> Mapping[str, ComponentNamings]:
        """The namings that the application finds in files of a format, or of a variant of it such as `…+alpha`."""
        found = self.names_by_format.get(format_name)
        return self.names_by_format.get(format_name.partition("+")[0], self.names) if found is None else found

    def loads(self, kind: Kind) -> bool | None:
        """Whether it loads that kind of adapter for these base models; None if not known."""
        return self.lora if kind == "lora" else self.lokr


@dataclass(frozen=True, eq=False)
class Application:
    """A program that loads adapters."""

    name: str
    title: str
    kind: Literal["interface", "engine", "library", "trainer"]
    aliases: tuple[str, ...]
    evidence: Evidence
    lora: str | None  # format that is written for it; None: it loads no LoRA
    dora: str | None  # the same, for LoRA with DoRA
    lokr: str | None
    dialect: str  # of its module names, if they do not depend on the base model; "" if they do
    formats: Mapping[str, str]  # format -> "" if it reads it, else the reason
    families: tuple[FamilySupport, ...]
    every_base: bool  # whether it runs every base model
    is_complete: bool  # whether it runs no other base model than those of `families`
    kinds: frozenset[str] | None  # of modules that it applies: lora, lokr, dense, …; None: all
    rules: tuple[str, ...]  # keys of rules.RULES
    vectors: Kinds | None  # that it loads; None: those that the format has a place for
    embeddings: bool  # whether it loads textual-inversion embeddings from the file
    unmatched: int | None  # number of unknown keys above which it refuses the whole file
    notes: Mapping[str, str]  # format -> how to load a file of it
    facts: Mapping[str, str]  # topic -> what it does, for `krona tools`

    def rejection(self, format_name: str) -> str | None:
        """Why it does not load files of a format, as a clause; None if it does, as far as the format is concerned."""
        if format_name in self.formats or "+" in format_name:  # a variant of a format is read unless it is listed
            return self.formats.get(format_name) or None
        return DEFAULT_REASONS.get(format_name, "it does not read this format")

    @cached_property
    def by_base(self) -> Mapping[str, FamilySupport]:
        """Catalog name of a base model -> its entry."""
        return {base: family for family in self.families for base in family.bases}


def _load(name: str) -> Application:
    text = files("krona_hub.formats.compatibility").joinpath("applications", f"{name}.json").read_text("utf-8")
    facts: dict[str, Any] = json.loads(text)
    evidence = Evidence(**facts["evidence"])
    vectors = facts.get("vectors", ())
    return Application(
        name=name,
        title=facts["title"],
        kind=facts["kind"],
        aliases=tuple(facts.get("aliases", ())),
        evidence=evidence,
        lora=facts.get("lora"),
        dora=facts.get("dora"),
        lokr=facts.get("lokr"),
        dialect=facts.get("dialect", ""),
        formats=facts["formats"],
        families=tuple(_family(entry, evidence) for entry in facts.get("families", ())),
        every_base=facts.get("every_base", False),
        is_complete=facts.get("complete", False),
        kinds=None if facts["kinds"] is None else frozenset(facts["kinds"]),
        rules=tuple(facts.get("rules", ())),
        vectors=None if vectors is None else tuple(vectors),
        embeddings=facts.get("embeddings", False),
        unmatched=facts.get("unmatched"),
        notes=facts.get("notes", {}),
        facts=facts["facts"],
    )


def _family(entry: Mapping[str, Any], evidence: Evidence) -> FamilySupport:
    missing = entry.get("missing", {})
    return FamilySupport(
        bases=tuple(entry["bases"]),
        evidence=evidence._replace(**entry["evidence"]) if "evidence" in entry else evidence,
        lora=entry.get("lora", True),
        lokr=entry.get("lokr", True),
        names=_names(entry.get("names", {}), missing),
        names_by_format={f: _names(names, missing) for f, names in entry.get("names_by_format", {}).items()},
        rejected=entry.get("rejected", {}),
        note=entry.get("note", ""),
        is_open=entry.get("other_names") == NOT_KNOWN,
    )


def _names(names: Mapping[str, list[str]], missing: Mapping[str, list[str]]) -> Mapping[str, ComponentNamings]:
    return {component: ComponentNamings(namings, missing) for component, namings in names.items()}


APPLICATIONS: Mapping[str, Application] = {name: _load(name) for name in ORDER}
ALIASES: Mapping[str, str] = {alias: name for name, known in APPLICATIONS.items() for alias in known.aliases}


def application_named(name: str) -> Application:
    """The application of that name or alias. Raises UsageError, with a suggestion, for an unknown name.

    >>> application_named("SwarmUI").title, application_named("AUTOMATIC1111").name
    ('ComfyUI', 'a1111')
    """
    key = name.lower()
    key = ALIASES.get(key, key)
    if key in APPLICATIONS:
        return APPLICATIONS[key]
    if key.replace(" ", "").replace("-", "") in WITHOUT_FACTS:
        raise UsageError(
            f"What {name} loads is not known: no facts about it were measured or read.",
            fix=f"The known applications are {', '.join(APPLICATIONS)}.",
        )
    near = get_close_matches(key, [*APPLICATIONS, *ALIASES], n=1)
    raise UsageError(
        f"Unknown application {name!r}.",
        fix=f"Did you mean {near[0]!r}?" if near else f"Choose one of {', '.join(APPLICATIONS)}.",
    )


def is_lora_format(application: Application, to: str) -> bool:
    """Whether `to`, a format or `lora` or `lokr`, is written for LoRA rather than for LoKr.

    Raises UsageError for a format that is not written for the application.

    >>> is_lora_format(APPLICATIONS["comfyui"], "lokr"), is_lora_format(APPLICATIONS["comfyui"], "kohya-lora")
    (False, True)
    """
    if to in ("lora", application.lora, application.dora):
        return True
    if to in ("lokr", application.lokr):
        return False
    formats = [name for name in dict.fromkeys((application.lora, application.dora, application.lokr)) if name]
    raise UsageError(
        f"{application.title} loads {one_of(formats)}, not {to}.",
        fix="Use --to lora or --to lokr with --for, or omit --for.",
    )


def file_format(application: Application, *, is_lora: bool, has_dora: bool = False) -> str | None:
    """The format that is written for an application and that kind of adapter; None if it does not load the kind."""
    if not is_lora:
        return application.lokr
    return (application.dora if has_dora else None) or application.lora
