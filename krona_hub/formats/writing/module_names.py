"""Module names in the file to be written. Torch-free.

Names come from the name table of the base model (`krona_hub.bases.name_table`). Without a base model, modules keep the
names of the file that they were read from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from krona_hub.adapters.unknown_base import UNKNOWN, module_name
from krona_hub.bases.dialects import processor_name
from krona_hub.bases.module_spec import Placement
from krona_hub.errors import InexpressibleError, abbreviated, counted

if TYPE_CHECKING:
    from krona_hub.bases.name_table import NameTable
    from krona_hub.formats.compatibility.naming import Names, Naming

SPLIT: Mapping[str, str] = {"kohya-ldm": "kohya"}  # dialect with separate q, k and v
PROJECTED = "text_encoder_2"
# a second CLIP has a projection (SDXL, SD3); in its class, `text_model.` is part of the path


@dataclass(frozen=True)
class Home:
    """A module of a file that stores a layer, or rows of it."""

    module: str
    placement: Placement
    siblings: tuple[Placement, ...]  # every layer that shares the module, this one included


@dataclass(frozen=True)
class FileNames:
    """How a file calls its modules: in a dialect, or as an application finds them in a base model."""

    dialect: str
    table: NameTable | None  # None: no known base model, so that modules keep the names of their file
    found: Names | None = None  # names that the application finds, or that most do; they replace the dialect
    title: str = ""  # of the application; without one, components that `found` does not cover keep the dialect
    split_qkv: bool = False
    several: frozenset[str] = frozenset()  # layers of several Kronecker terms, which only a module with others can hold
    _joined: dict[str, Naming | None] = field(default_factory=dict, compare=False, repr=False)  # component -> naming

    def homes(self, layers: Iterable[str]) -> Mapping[str, tuple[Home, ...]]:
        """Layer -> the module that stores it, or the modules that together do.

        Without a base model, layers keep the names of their file, or their canonical names. Raises InexpressibleError
        if a layer has no name.
        """
        layers = tuple(layers)
        if self.found is None:
            return homes(layers, self.dialect, self.table, split_qkv=self.split_qkv)
        found = self.found
        own = layers if self.title else tuple(layer for layer in layers if found.covers(layer))
        others = tuple(layer for layer in layers if layer not in own) if len(own) < len(layers) else ()
        dialect = homes(others, self.dialect, self.table) if others else {}
        placed = {**dialect, **self._found_homes(own, found)}
        return {layer: placed[layer] for layer in layers}

    def _found_homes(self, layers: tuple[str, ...], found: Names) -> Mapping[str, tuple[Home, ...]]:
        places = {layer: self._home(layer, found) for layer in layers}
        lost = [layer for layer, own in places.items() if not own]
        if lost:
            leave_out = " Or add --allow-missing to leave them out." if len(lost) < len(layers) else ""
            raise InexpressibleError(
                f"{self.title} finds no module of {found.base.name} for {len(lost)} of {counted(len(layers), 'layer')} "
                f"({abbreviated(lost)}).",
                fix=f"Merge the adapter into the base model, or write another format with --to.{leave_out}",
            )
        return places

    def lost(self, layers: Iterable[str]) -> tuple[str, ...]:
        """The layers that the application does not find; () without an application."""
        found = self.found if self.title else None
        return () if found is None else tuple(layer for layer in layers if not self._home(layer, found))

    def _home(self, layer: str, found: Names) -> tuple[Home, ...]:
        """The modules of a layer in the first naming that the application finds, if possible without fused ones."""
        component = layer.partition(".")[0]
        options = [(known, self._homes(known, layer, found)) for known in found.usable(layer)]
        joined = self._joined_naming(component, found) if self.several and not self.split_qkv else None
        if self.split_qkv:
            options.sort(key=lambda option: any(len(home.siblings) > 1 for home in option[1]))
        elif joined is not None:
            options.sort(key=lambda option: option[0] != joined or not all(map(self._is_whole, option[1])))
        return options[0][1] if options else ()

    @staticmethod
    def _homes(known: Naming, layer: str, found: Names) -> tuple[Home, ...]:
        return tuple(Home(*home) for home in found.speller(layer.partition(".")[0]).homes(known, layer))

    def _joined_naming(self, component: str, found: Names) -> Naming | None:
        """The first naming whose modules join layers of the component that have no form of their own."""
        if component not in self._joined:
            own = (layer for layer in sorted(self.several) if layer.partition(".")[0] == component)
            options = ((known, self._homes(known, layer, found)) for layer in own for known in found.usable(layer))
            self._joined[component] = next((n for n, to in options if any(len(home.siblings) > 1 for home in to)), None)
        return self._joined[component]

    def _is_whole(self, home: Home) -> bool:
        """Whether the module is one layer, or joins layers one of which has no form of its own."""
        return len(home.siblings) == 1 or any(place.layer in self.several for place in home.siblings)

    def vector_name(self, path: str) -> str:
        """The name of a norm or of a bare parameter. Raises InexpressibleError if it has none."""
        if self.found is not None and (self.title or self.found.covers(path)):
            component, _, inside = path.partition(".")
            known = next(self.found.usable(path), None)
            if known is None:
                raise InexpressibleError(
                    f"{self.title} finds no parameter {path}.", fix="Add --allow-missing to leave it out."
                )
            return self.found.speller(component).norm_name(known, inside)
        return vector_name(path, self.dialect, self.table)


def homes(
    layers: Iterable[str], dialect: str, table: NameTable | None, *, split_qkv: bool = False
) -> Mapping[str, tuple[Home, ...]]:
    """Layer -> the module that stores it in a file of that dialect, or the modules that together do.

    Without a base model, layers keep the names of their file, or their canonical names. Raises InexpressibleError if
    the dialect has no name for a layer.
    """
    layers = tuple(layers)
    if dialect == "lycoris" or table is None:
        return {layer: (_alone(_plain_name(layer, dialect), layer),) for layer in layers}
    if split_qkv and any(len(ps) > 1 for ps in table.fused(dialect).values()):
        dialect = SPLIT.get(dialect, dialect)
    special: dict[str, tuple[Home, ...]] = {}
    for module, placements in table.fused(dialect).items():
        for p in placements:
            others = special.get(p.layer, ()) if p.part else ()
            special[p.layer] = (*others, Home(module, p, placements))
    return {layer: special.get(layer) or (_alone(table.spell(layer, dialect), layer),) for layer in layers}


def vector_name(path: str, dialect: str, table: NameTable | None) -> str:
    """The name of a norm in a file of that dialect. Raises InexpressibleError if it has none."""
    return _plain_name(path, dialect) if dialect == "lycoris" or table is None else table.vector_name(path, dialect)


def _alone(module: str, layer: str) -> Home:
    placement = Placement(layer)
    return Home(module, placement, (placement,))


def _plain_name(layer: str, dialect: str) -> str:
    """The name of a layer in a dialect without a name table: that of its file, or the dotted canonical name."""
    component, _, path = layer.partition(".")
    own = module_name(layer)
    if own is not None:
        return f"{own}_lora" if dialect == "processor" else own
    if dialect == "peft":
        return path
    if dialect == "lycoris":
        return f"lycoris_{path.replace('.', '_')}"
    if dialect != "processor":
        return f"{component}.{wrapped(component, path)}"
    old = processor_name(component, wrapped(component, path))
    if old is None:
        raise InexpressibleError(
            f"{layer} has no name in the processor dialect.", fix="Choose another format, or omit the layer."
        )
    return old


def wrapped(component: str, path: str) -> str:
    """A CLIP path with the `text_model.` prefix that diffusers, kohya and ComfyUI expect.

    >>> wrapped("text_encoder", "encoder.layers.0.mlp.fc1"), wrapped("unet", "conv_in")
    ('text_model.encoder.layers.0.mlp.fc1', 'conv_in')
    """
    clip = component.startswith("text_encoder") and path.startswith("encoder.layers.")
    return f"text_model.{path}" if clip else path


def live_path(layer: str, table: NameTable | None) -> str:
    """The path of a layer in models built by current transformers and diffusers.

    >>> live_path("text_encoder.encoder.layers.0.mlp.fc1", None)
    'encoder.layers.0.mlp.fc1'
    >>> live_path("text_encoder_2.encoder.layers.0.mlp.fc1", None)
    'text_model.encoder.layers.0.mlp.fc1'
    """
    if table is not None:
        return table.spell(layer, "peft")
    component, _, path = layer.partition(".")
    if component == UNKNOWN:
        return path
    return wrapped(component, path) if component == PROJECTED else path


def check_one_component(components: Iterable[str], dialect: str) -> None:
    """Raise InexpressibleError for two components in the LyCORIS dialect, which supports one model per file."""
    names = tuple(components)
    if dialect == "lycoris" and len(names) > 1:
        raise InexpressibleError(
            f"A file with lycoris_ names supports one component, but the adapter has {', '.join(names)}.",
            fix="Use --to lycoris-lokr, whose names include the component.",
        )
