"""The module names of a file to be written: in a dialect, or as the target application finds them. Torch-free."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.bases.base import Base
from krona_hub.bases.name_table import table
from krona_hub.errors import InexpressibleError
from krona_hub.formats.compatibility.applications import APPLICATIONS, Application, FamilySupport
from krona_hub.formats.compatibility.base_support import support_of
from krona_hub.formats.compatibility.default_names import default_names
from krona_hub.formats.compatibility.naming import Names
from krona_hub.formats.forms.normal_forms import lora_of
from krona_hub.formats.known.registry import storage_of
from krona_hub.formats.writing.aim import Aim, kinds_of
from krona_hub.formats.writing.module_names import FileNames

TITLES = {"lora": "LoRA", "lokr": "LoKr"}


def file_names(aim: Aim, base: Base | None, adapter: Adapter) -> FileNames:
    """The names of modules in a file for an aim. Raises InexpressibleError if the application does not load it."""
    names = None if base is None else table(base)
    several = frozenset(name for name, delta in adapter.layers.items() if _has_several_terms(delta))
    plain = FileNames(aim.dialect, names, split_qkv=aim.split_qkv, several=several)
    if base is None or (aim.tool is not None and aim.tool.every_base):
        return plain
    if aim.tool is not None:
        support = supported(aim.tool, base, kinds_of(adapter))
        return replace(plain, found=Names(base, support.names_for(aim.format)), title=aim.tool.title)
    storage = storage_of(aim.format)
    if storage.layout != "kohya":
        return plain
    kind = "lokr" if storage.kind == "kronecker" else "lora"
    return replace(plain, found=default_names(base, aim.format, kind, tuple(adapter.layers)))


def _has_several_terms(delta: LayerDelta) -> bool:
    return lora_of(delta) is None and sum(s.terms for s in delta.sums) > 1


def lost_layers(aim: Aim, base: Base, layers: Collection[str]) -> tuple[str, ...]:
    """The layers that the application does not find; () without one, or if it does not run the base model."""
    support = support_of(aim.tool, base) if aim.tool is not None and not aim.tool.every_base else None
    if aim.tool is None or support is None:
        return ()
    found = Names(base, support.names_for(aim.format))
    return FileNames(aim.dialect, table(base), found=found, title=aim.tool.title).lost(layers)


def supported(application: Application, base: Base, kinds: Collection[str]) -> FamilySupport:
    """The entry of the application for a base model, if it loads adapters of these kinds (lora, lokr).

    Raises InexpressibleError, with the applications that do, for other base models and kinds, and for those of which
    that is not known.
    """
    support = known_support(application, base, kinds)
    for kind in sorted(kinds):
        loads = support.loads("lora" if kind == "lora" else "lokr")
        if not loads:
            title = TITLES[kind]
            why = (
                f"Whether {application.title} loads {title} for {base.name} is not known"
                if loads is None
                else f"{application.title} loads no {title} for {base.name}"
                + (f": {support.note}" if support.note else "")
            )
            fix = (
                f"Use --for {application.name} --to lora." if kind == "lokr" and support.lora else _instead(base, kinds)
            )
            raise InexpressibleError(f"{why}; nothing was written.", fix=fix)
    return support


def known_support(application: Application, base: Base, kinds: Collection[str]) -> FamilySupport:
    """The entry of the application for a base model.

    Raises InexpressibleError, with the applications for adapters of these kinds, if there is none.
    """
    support = support_of(application, base)
    if support is None:
        known = application.is_complete and base.family is not None
        why = f"{application.title} does not run {base.name}" if known else (
            f"Whether {application.title} runs {base.name} is not known"
        )  # fmt: skip
        raise InexpressibleError(f"{why}; nothing was written.", fix=_instead(base, kinds))
    return support


def _instead(base: Base, kinds: Collection[str]) -> str:
    """The applications that load such an adapter for this base model."""
    others = [
        name
        for name, known in APPLICATIONS.items()
        if not known.every_base
        and (support := support_of(known, base)) is not None
        and all(support.loads("lora" if kind == "lora" else "lokr") for kind in kinds)
    ]
    listed = f"Applications that do: {', '.join(others)}. " if others else ""
    return f"{listed}--to lora and --to lokr write a file for no particular application."
