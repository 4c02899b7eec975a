"""`Format` and `Storage`: how a file format is recognized, read and written. Torch-free.

Most formats differ only in key names and in one scale rule, which shared code handles; a `Format` states the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from krona_hub.formats.forms.limits import Limit
from krona_hub.formats.forms.vector_kinds import Kinds
from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.formats.parsing.module_layout import ModuleLayout
from krona_hub.formats.parsing.scales import ScaleConfig

if TYPE_CHECKING:
    from krona_hub.formats.parsing.base_match import BaseMatch

Configs = Mapping[str, ScaleConfig]  # component, or "" for all -> configuration


def no_configs(file: AdapterFile) -> Configs:
    return {}


def no_notes(file: AdapterFile) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Storage:
    """How a format stores modules: everything the writer needs to know.

    Parameters
    ----------
    kind : {"any", "kronecker", "low-rank"}
        What one module stores: any Kronecker sum, one term A ⊗ B, or one product up·down.
    layout : str
        How modules become files: a key of `PACKERS`.
    dialect : str, default ""
        Module names that most readers of the format support: a key of `DIALECTS`.
    limits : tuple of Limit, default ()
        Rules for deltas that the format cannot store.
    lora_keys, magnitude_key : tuple of str, str
        Parameter names of up and down, and of the DoRA magnitude; kohya's names by default.
    alpha : bool, default False
        Whether each module has an alpha; it is written equal to the rank, so the scale is 1.
    vectors : tuple of VectorKind, default ()
        Kinds of vectors with a place.
    embeddings : bool, default False
        Whether textual-inversion embeddings have a place.
    one_factor : bool, default False
        Whether a single `decompose_factor` must reproduce the shapes of all layers (PEFT).
    folder : bool, default False
        Whether the output is a folder of files.
    network_module, algorithm : str, default ""
        `ss_network_module` of kohya's metadata, and `algo` in its `ss_network_args`.

    Examples
    --------
    >>> storage = Storage(kind="kronecker", layout="kohya", dialect="kohya", alpha=True)
    >>> storage.magnitude_key, storage.folder
    ('dora_scale', False)
    """

    kind: Literal["any", "kronecker", "low-rank"]
    layout: str
    dialect: str = ""
    limits: tuple[Limit, ...] = ()
    lora_keys: tuple[str, str] = ("lora_up.weight", "lora_down.weight")
    magnitude_key: str = "dora_scale"
    alpha: bool = False
    vectors: Kinds = ()
    embeddings: bool = False
    one_factor: bool = False
    folder: bool = False
    network_module: str = ""
    algorithm: str = ""


@dataclass(frozen=True)
class Format:
    """A file format of adapters; `FORMATS` lists all of them.

    Parameters
    ----------
    name : str
        Value of `--to` and `--from`.
    summary : str
        One line for `krona formats`.
    recognizes : callable
        AdapterFile -> bool, decided by key names, shapes and metadata only.
    scale : str
        Scale rule in words, for `krona inspect`.
    storage : Storage or None
        How the format is written; None for a read-only format.
    kinds : mapping of str to str, default {}
        Kind of the keys -> kind of the layout, where they differ.
    configs : callable, optional
        AdapterFile -> configurations that set the scales, by component ("" for all). Default: none.
    match_base : callable, optional
        Assigns modules to layers where the file does not store module names.
    notes : callable, optional
        AdapterFile -> notes for the user. Default: none.

    Examples
    --------
    >>> from krona_hub.formats.known.registry import by_name
    >>> by_name("cloneofsimo").writes, by_name("peft-lora").scale
    (False, 'lora_alpha / r from adapter_config.json, or lora_alpha / √r with use_rslora')
    """

    name: str
    summary: str
    recognizes: Callable[[AdapterFile], bool]
    scale: str
    storage: Storage | None
    kinds: Mapping[str, str] = field(default_factory=dict)
    configs: Callable[[AdapterFile], Configs] = no_configs
    match_base: Callable[[AdapterFile, Mapping[str, ModuleLayout]], BaseMatch] | None = None
    notes: Callable[[AdapterFile], tuple[str, ...]] = no_notes

    @property
    def writes(self) -> bool:
        """Whether krona writes the format."""
        return self.storage is not None
