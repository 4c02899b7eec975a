"""A base from what people have: a catalogue name, a diffusers folder, a component folder, a checkpoint file.

Names and shapes come from safetensors headers; only a folder that has nothing but `config.json` needs diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from krona_hub.assets.shipped import folder_of
from krona_hub.bases import catalogue, detection, ldm_names
from krona_hub.bases.base import COMPONENTS, Base
from krona_hub.bases.component import Component
from krona_hub.bases.meta_device import modules_of
from krona_hub.bases.module_spec import ModuleSpec, Placement
from krona_hub.bases.name_table import table
from krona_hub.bases.weight_files import (
    StoredTensor,
    WeightPlace,
    files_of,
    modules_in,
    read,
    stored_in,
    weights_by_module,
)
from krona_hub.errors import FormatError, NotFoundError, UnknownBaseError

__all__ = [
    "WeightPlace",
    "landed",
    "load_base",
    "named_base",
    "open_checkpoint",
    "read",
    "stored_by_component",
    "weight_files",
]


def load_base(source: str | Path) -> Base:
    """The base that `source` names or holds.

    A source is a path if it exists, otherwise a catalogue name or a Hub id that the catalogue knows. A diffusers
    folder is read component by component (`unet/`, `transformer/`, `text_encoder*/`), from weights where there are
    any, else from its configs; of a checkpoint file only the header is read. Raises UnknownBaseError where no base can
    be made of it, NotFoundError for a path that does not exist, FormatError for a file that is no safetensors.
    """
    path = Path(source)
    if path.is_dir():
        return named_base({c: _folder_modules(folder) for c, folder in component_folders(path).items()}, str(path))
    if path.exists():
        return _file_base(path)
    if catalogue.find(str(source)) is None and path.suffix in (".safetensors", ".ckpt", ".pt"):
        raise NotFoundError(f"there is no file {source}.", fix="Check the path.")
    return catalogue.get(str(source))


def weight_files(source: str | Path) -> dict[str, WeightPlace]:
    """Canonical layer -> where its base weight lies; {} for the name of a base that does not ship, or without weights.

    `read(place)` gives the tensor itself.
    """
    path = folder_of(source)
    if path.is_dir():
        return {
            layer: w
            for c, stored in stored_by_component(path).items()
            for layer, w in plainly_placed(c, stored).items()
        }
    if not path.exists():
        return {}
    return placed(path, stored_in([path]))


def open_checkpoint(path: Path) -> tuple[Base, dict[str, WeightPlace]]:
    """The base in one file, and where in it the weight of each layer lies: both for the price of one."""
    stored = stored_in([path])
    base = _base_of_tensors(path, stored)
    return base, landed(base, stored)


def stored_by_component(folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """Component -> tensor name -> place, of a pipeline or of a lone component."""
    return {c: stored_in(files_of(f)) for c, f in component_folders(folder).items()}


def placed(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, WeightPlace]:
    """Canonical layer -> where its weight lies, of tensors under any names that a base of the catalogue has.

    `path` is what an error calls them. Raises UnknownBaseError where no base is known by these names.
    """
    return landed(_base_of_tensors(path, stored), stored)


def plainly_placed(component: str, stored: Mapping[str, StoredTensor]) -> dict[str, WeightPlace]:
    """Canonical layer -> where its weight lies, of one component's tensors under their diffusers names."""
    weights = {path.removeprefix("text_model."): w for path, w in weights_by_module(stored).items()}
    layers = {f"{component}.{path}": w for path, w in weights.items()}
    return {layer: WeightPlace(w.path, w.tensor, Placement(layer)) for layer, w in layers.items()}


def landed(base: Base, stored: Mapping[str, StoredTensor]) -> dict[str, WeightPlace]:
    """Canonical layer -> place, of weights under any names that `base` knows."""
    weights = weights_by_module(stored)
    return {
        place.layer: WeightPlace(weight.path, weight.tensor, place)
        for name, weight in weights.items()
        for place in table(base).find(name) or ()
    }


def component_folders(path: Path) -> dict[str, Path]:
    """component -> folder, of a pipeline or of a lone component."""
    folders = {c: path / c for c in COMPONENTS if _has_model(path / c)}
    if folders:
        return folders
    if not _has_model(path):
        raise UnknownBaseError(
            f"{path} holds no base model.",
            fix="Give a diffusers folder (with unet/ or transformer/), a component folder or a checkpoint file.",
        )
    return {_component_of(path): path}


def _has_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or any(folder.glob("*.safetensors*"))


def _component_of(folder: Path) -> str:
    """Which component a lone folder is: by its own name, its class, or what it contains."""
    if folder.name in COMPONENTS:
        return folder.name
    class_name = _class_of(_config(folder))
    if class_name.startswith("Autoencoder"):
        raise UnknownBaseError(
            f"{folder} is a {class_name}.", fix="Adapters change the unet, transformer or text encoder."
        )
    if "UNet" in class_name:
        return "unet"
    if "_class_name" in _config(folder):
        return "transformer"
    return "text_encoder" if class_name else _component_by_content(_folder_modules(folder))


def _component_by_content(modules: Mapping[str, ModuleSpec]) -> str:
    if ldm_names.is_unet(modules):
        return "unet"
    return "text_encoder" if Component(modules).kind else "transformer"


def _folder_modules(folder: Path) -> Mapping[str, ModuleSpec]:
    files = files_of(folder)
    if files:
        return modules_in(stored_in(files))
    config = _config(folder)
    library = "diffusers" if "_class_name" in config else "transformers"
    return modules_of(library, _class_of(config), config)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError as error:
        raise FormatError(f"{path} is no JSON: {error}.", fix="Download it again.") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path} is no configuration of a model.", fix="Download it again.")
    return config


def _class_of(config: Mapping[str, Any]) -> str:
    return str(config.get("_class_name") or next(iter(config.get("architectures") or ()), ""))


def _file_base(path: Path) -> Base:
    return _base_of_tensors(path, stored_in([path]))


def _base_of_tensors(path: Path, stored: Mapping[str, StoredTensor]) -> Base:
    """A checkpoint in one file: diffusers names as they are, original names by the catalogue."""
    plain = _diffusers_components(modules_in(stored))
    if plain:
        return named_base(plain, str(path))
    weights = weights_by_module(stored)
    found = detection.candidates({name: w.shape for name, w in weights.items()})
    for candidate in found[:4]:
        base = catalogue.get(candidate.base)
        places = landed(base, stored)
        whole = {c: m for c, m in base.components.items() if all(f"{c}.{p}" in places for p in m)}
        if whole:
            return named_base({c: _as_stored(c, m, places, stored) for c, m in whole.items()}, str(path))
    raise UnknownBaseError(
        f"{path} is no checkpoint of a base that is known by its original names.",
        fix="Give it as a diffusers folder, or name the base: " + ", ".join(catalogue.names()) + ".",
    )


def _as_stored(
    component: str,
    modules: Mapping[str, ModuleSpec],
    places: Mapping[str, WeightPlace],
    stored: Mapping[str, StoredTensor],
) -> dict[str, ModuleSpec]:
    """The catalogue's modules with the file's shapes: an inpainting U-Net has a wider `conv_in`."""

    def actual(path: str, module: ModuleSpec) -> ModuleSpec:
        weight = places[f"{component}.{path}"]
        shape = stored[weight.tensor].shape
        same = prod(shape) == prod(module.shape) or not weight.placement.plain
        return module if same else module._replace(shape=shape)

    return {path: actual(path, module) for path, module in modules.items()}


def _diffusers_components(modules: Mapping[str, ModuleSpec]) -> dict[str, dict[str, ModuleSpec]]:
    """component -> modules where the names are those of diffusers, with the component in front or of one alone."""
    parts: dict[str, dict[str, ModuleSpec]] = {}
    for name, module in modules.items():
        component, _, path = name.partition(".")
        if component in COMPONENTS:
            parts.setdefault(component, {})[path.removeprefix("text_model.")] = module
    if parts:
        return parts
    kind = next((c for c, signs in SIGNS.items() if any(sign in modules for sign in signs)), None)
    return {kind: dict(modules)} if kind else {}


SIGNS: Mapping[str, tuple[str, ...]] = {  # a module that says: diffusers' names, of this component alone
    "unet": ("mid_block.resnets.0.conv1",),
    "transformer": (
        "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn1.to_q", "joint_transformer_blocks.0.attn.to_q",
        "blocks.0.attn1.to_q", "layers.0.attention.to_q", "layers.0.attn.to_q",
        "double_stream_blocks.0.block.attn1.to_q",
    ),
    "text_encoder": ("encoder.layers.0.self_attn.q_proj", "encoder.block.0.layer.0.SelfAttention.q"),
}  # fmt: skip


def named_base(modules: Mapping[str, Mapping[str, ModuleSpec]], name: str) -> Base:
    """A base of these modules, with the family of the catalogue's base that it equals, where it equals just one."""
    components = {c: Component(of_one) for c, of_one in modules.items()}
    base = Base(name, None, components)
    equal = _by_fingerprint().get(base.fingerprint, ()) if base.denoiser else ()
    if len(equal) != 1:
        return Base(name, None, components, candidates=equal)
    return Base(name, equal[0], components, catalogue.get(equal[0]).hub_id)


@cache
def _by_fingerprint() -> Mapping[str, tuple[str, ...]]:
    known: dict[str, tuple[str, ...]] = {}
    for name in catalogue.names():
        fingerprint = catalogue.get(name).fingerprint
        known[fingerprint] = (*known.get(fingerprint, ()), name)
    return known
