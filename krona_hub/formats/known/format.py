"""What a format is to the rest of the program: a few facts, and the verbs that follow from them. Torch-free.

Most formats differ in names and in one scale rule only, and the shared machinery knows those; a spoke states the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.formats.parsing.module_layout import Layout
from krona_hub.formats.parsing.scales import ScaleConfig

if TYPE_CHECKING:
    from krona_hub.formats.parsing.base_match import Landing

Configs = Mapping[str, ScaleConfig]  # component, or "" for all -> configuration


def no_configs(file: AdapterFile) -> Configs:
    return {}


@dataclass(frozen=True)
class Rules:
    """Where a format differs from the others."""

    scale: str  # its scale rule in words
    kinds: Mapping[str, str] = field(default_factory=dict)  # kind of the keys -> kind of layout, where they differ
    configs: Callable[[AdapterFile], Configs] = no_configs  # configurations that set the scales
    land: Callable[[AdapterFile, Mapping[str, Layout]], Landing] | None = None  # where modules have no names
    notes: Callable[[AdapterFile], tuple[str, ...]] = lambda file: ()


class Verbs(NamedTuple):
    read: Callable[..., Any]  # as krona_hub.read
    describe: Callable[..., Any]  # as krona_hub.formats.reading.describe.describe
    write: Callable[..., Any]  # as krona_hub.write


def verbs(name: str) -> Verbs:
    """`read`, `describe` and `write` of the format called `name`."""

    def read(source: Any, **options: Any) -> Any:
        from krona_hub.formats.reading import reader

        return reader.read(source, format=name, **options)

    def describe(source: Any, **options: Any) -> Any:
        from krona_hub.formats.reading import describe

        return describe.describe(source, format=name, **options)

    def write(adapter: Any, path: Any, **options: Any) -> Any:
        from krona_hub.formats.writing import writer

        return writer.write(adapter, path, format=name, **options)

    return Verbs(read, describe, write)
