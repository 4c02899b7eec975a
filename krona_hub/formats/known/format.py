"""What a format is to the rest of the program: a name, how a file of it is recognised, and where it differs.

Most formats differ in names and in one scale rule only, and the shared machinery knows those; a format states the rest.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from krona_hub.formats.forms.limits import Limit
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
class Storage:
    """How a format stores the modules that it holds: what the writer has to know."""

    kind: Literal["any", "kronecker", "low-rank"]  # any sum, one Kronecker term, or one up·down per module
    layout: str  # how modules become files: a key of PACKERS
    dialect: str = ""  # the names that most of its readers know: a key of DIALECTS
    limits: tuple[Limit, ...] = ()  # what it cannot hold
    lora_keys: tuple[str, str] = ("lora_up.weight", "lora_down.weight")  # of up and of down
    magnitude_key: str = "dora_scale"
    alpha: bool = False  # whether every module has an alpha, which is written equal to the rank
    one_factor: bool = False  # whether one decompose_factor must give the shapes of every layer
    folder: bool = False  # a folder of files
    network_module: str = ""  # ss_network_module of kohya's metadata
    algorithm: str = ""  # the `algo` of its ss_network_args


@dataclass(frozen=True)
class Format:
    """A file format of adapters: a value of the tuple FORMATS."""

    name: str  # as `--to` and `--from` spell it
    summary: str  # one line, for `krona formats`
    recognizes: Callable[[AdapterFile], bool]  # by names, shapes and metadata only
    scale: str  # its scale rule in words
    storage: Storage | None  # None for a format that is only read
    kinds: Mapping[str, str] = field(default_factory=dict)  # kind of the keys -> kind of layout, where they differ
    configs: Callable[[AdapterFile], Configs] = no_configs  # configurations that set the scales
    land: Callable[[AdapterFile, Mapping[str, ModuleLayout]], Landing] | None = None  # where modules have no names
    notes: Callable[[AdapterFile], tuple[str, ...]] = no_notes

    @property
    def writes(self) -> bool:
        return self.storage is not None
