"""What a format is to the rest of the program: a name, how a file of it is recognised, and where it differs.

Most formats differ in names and in one scale rule only, and the shared machinery knows those; a format states the rest.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.formats.parsing.module_layout import ModuleLayout
from krona_hub.formats.parsing.scales import ScaleConfig

if TYPE_CHECKING:
    from krona_hub.formats.parsing.base_match import Landing

Configs = Mapping[str, ScaleConfig]  # component, or "" for all -> configuration


def no_configs(file: AdapterFile) -> Configs:
    return {}


def no_notes(file: AdapterFile) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Format:
    """A file format of adapters: a value of the tuple FORMATS."""

    name: str  # as `--to` and `--from` spell it
    summary: str  # one line, for `krona formats`
    recognises: Callable[[AdapterFile], bool]  # by names, shapes and metadata only
    scale: str  # its scale rule in words
    kinds: Mapping[str, str] = field(default_factory=dict)  # kind of the keys -> kind of layout, where they differ
    configs: Callable[[AdapterFile], Configs] = no_configs  # configurations that set the scales
    land: Callable[[AdapterFile, Mapping[str, ModuleLayout]], Landing] | None = None  # where modules have no names
    notes: Callable[[AdapterFile], tuple[str, ...]] = no_notes
    writes: bool = True  # False for a format that is only read
