"""Load a base model from a catalog name, a diffusers folder, a component folder or a checkpoint file.

Names and shapes come from safetensors headers; only folders with a `config.json` but no weights need diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from krona_hub.assets.shipped import folder_of
from krona_hub.bases import catalog, catalog_index, detection
from krona_hub.bases.base import COMPONENTS, DENOISERS, Base
from krona_hub.bases.component import Component
from krona_hub.bases.meta_device import modules_of
from krona_hub.bases.module_spec import ModuleSpec, Placement
from krona_hub.bases.name_table import table
from krona_hub.bases.weight_files import (
    StoredTensor,
    WeightPlace,
    WeightPlaces,
    component_by_content,
    files_of,
    is_adapter,
    modules_in,
    only_pickles,
    parameter_of,
    read,
    stored_in,
    unwrapped,
    weights_by_module,
    whole_weights,
)
from krona_hub.checkpoints.file_names import ADAPTER_PICKLES, SAFETENSORS
from krona_hub.errors import SPECIFY_BASE, FormatError, NotFoundError, UnknownBaseError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "WeightPlace",
    "WeightPlaces",
    "Weights",
    "base_in_file",
    "base_weights",
    "landed",
    "landed_vectors",
    "load_base",
    "named_base",
    "open_checkpoint",
    "plain_vectors",
    "read",
    "stored_by_component",
    "vector_files",
    "weight_files",
]

Weights = Callable[[str], "Tensor | None"]  # canonical layer or parameter -> tensor of the base model


def load_base(source: str | Path) -> Base:
    """Load the names and shapes of a base model, known or not; reads headers and configurations, never weights.

    Parameters
    ----------
    source : str or Path
        A path if it exists: a diffusers folder (`unet/`, `transformer/`, `text_encoder*/`), a component folder or a
        safetensors checkpoint. Otherwise a catalog name, an alias, or a Hub id that the catalog lists.

    Returns
    -------
    Base
        Modules by component, with their norms. `family` is the equal entry of the catalog, or None.

    Raises
    ------
    NotFoundError
        A checkpoint file does not exist.
    UnknownBaseError
        The name is unknown, or the files do not contain a model.
    FormatError
        A file is not valid safetensors or JSON.

    Examples
    --------
    >>> base = load_base("tiny-scenes")
    >>> base.denoiser, base.text_encoders, len(list(base.layers()))
    ('unet', ('text_encoder',), 95)
    """
    path = Path(source)
    if path.is_dir():
        return named_base({c: _folder_modules(folder) for c, folder in component_folders(path).items()}, str(path))
    if path.exists():
        return base_in_file(path)
    if catalog.find(str(source)) is None and path.suffix in (SAFETENSORS, *ADAPTER_PICKLES):
        raise NotFoundError(f"File {source} does not exist.", fix="Check the path.")
    return catalog.get(str(source))


def weight_files(source: str | Path) -> dict[str, WeightPlaces]:
    """Canonical layer -> location of its base weight; {} for a base model without local weights.

    `read(places)` returns the tensor itself.
    """
    path = folder_of(source)
    if path.is_dir():
        return {
            layer: w
            for c, stored in stored_by_component(path, whole=False).items()
            for layer, w in plainly_placed(c, stored).items()
        }
    return open_checkpoint(path)[1] if path.exists() else {}


def vector_files(source: str | Path) -> dict[str, WeightPlaces]:
    """Canonical parameter -> location, of every bias, norm and bare parameter; {} without local weights.

    `read(places)` returns the tensor itself, in the shape of the parameter.
    """
    path = folder_of(source)
    if path.is_dir():
        return {n: w for c, stored in stored_by_component(path).items() for n, w in plain_vectors(c, stored).items()}
    if not path.exists():
        return {}
    stored = stored_in([path])
    return landed_vectors(_base_of(path, stored), stored)


def base_weights(source: str | Path) -> Weights:
    """Return a function from a canonical layer or parameter to its tensor, None if there is none.

    Files are opened lazily.
    """

    @cache
    def places() -> Mapping[str, WeightPlaces]:
        return weight_files(source)

    @cache
    def vectors() -> Mapping[str, WeightPlaces]:
        return vector_files(source)

    def weight(name: str) -> Tensor | None:
        found = places().get(name) or vectors().get(name)
        return read(found) if found else None

    return weight


def base_in_file(path: Path, *, listed_only: bool = False) -> Base:
    """The base model in one checkpoint file.

    A model with the names of neither the catalog nor diffusers keeps its own, except with `listed_only`. Raises
    UnknownBaseError for a file without weights of a model.
    """
    return _base_of(path, stored_in([path]), listed_only=listed_only)


def open_checkpoint(path: Path, *, listed_only: bool = False) -> tuple[Base, dict[str, WeightPlaces]]:
    """The base model of `base_in_file` and the location of each layer's weight, from a single header read."""
    stored = stored_in([path])
    base = _base_of(path, stored, listed_only=listed_only)
    return base, landed(base, stored)


def stored_by_component(folder: Path, *, whole: bool = True) -> dict[str, dict[str, StoredTensor]]:
    """Component -> tensor name -> location, for a pipeline or a single component.

    Raises the error of `refuse_pickles`.
    """
    folders = component_folders(folder)
    refuse_pickles(folders, whole=whole)
    return {c: stored_in(files_of(f)) for c, f in folders.items()}


def refuse_pickles(folders: Mapping[str, Path], *, whole: bool = False) -> None:
    """Raise PickleError if the denoiser, the only component or, with `whole`, any has weights only as pickles."""
    for component, path in folders.items():
        needed = whole or len(folders) == 1 or component in DENOISERS
        if needed and (pickles := only_pickles(path)):
            raise pickles


def placed(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, WeightPlaces]:
    """Canonical layer -> location of its weight, for tensors with any names of a base model in the catalog.

    `path` names the source in errors. Raises UnknownBaseError if no base model has these names.
    """
    return landed(_base_of(path, stored, listed_only=True), stored)


def plainly_placed(component: str, stored: Mapping[str, StoredTensor]) -> dict[str, WeightPlaces]:
    """Canonical layer -> location of its weight, for the tensors of one component with diffusers names."""
    weights = {path.removeprefix("text_model."): w for path, w in weights_by_module(stored).items()}
    layers = {f"{component}.{path}": w for path, w in weights.items()}
    return {layer: (WeightPlace(w.path, w.tensor, Placement(layer)),) for layer, w in layers.items()}


def landed(base: Base, stored: Mapping[str, StoredTensor], component: str | None = None) -> dict[str, WeightPlaces]:
    """Canonical layer -> location of its weight, for tensors with any names of `base`, or of one component of it."""
    weights = weights_by_module(stored)
    placed_weights = (
        WeightPlace(weight.path, weight.tensor, place)
        for name, weight in weights.items()
        for place in table(base).find(name, component) or ()
    )
    found = whole_weights(placed_weights, {layer: module.shape for layer, module in base.layers()}.get)
    if base.family is None and base.denoiser:  # names as in the file, of a model that the catalog does not list
        exact = plainly_placed(base.denoiser, unwrapped(stored))
        found |= {layer: place for layer, place in exact.items() if base.module(layer) is not None}
    return found


def plain_vectors(component: str, stored: Mapping[str, StoredTensor]) -> dict[str, WeightPlaces]:
    """Canonical parameter -> location, for the biases, norms and bare parameters with diffusers names."""
    modules = modules_in(stored)
    paths = {name.removeprefix("text_model."): tensor for name, tensor in stored.items()}
    found = {f"{component}.{path}": t for path, t in paths.items() if modules.parameter(path) is not None}
    return {parameter: (WeightPlace(t.path, t.tensor, Placement(parameter)),) for parameter, t in found.items()}


def landed_vectors(base: Base, stored: Mapping[str, StoredTensor]) -> dict[str, WeightPlaces]:
    """Canonical parameter -> location, for the biases, norms and bare parameters with any names of `base`."""
    found = whole_weights(_every_vector(base, stored), base.parameter)
    if base.family is None and base.denoiser:
        exact = plain_vectors(base.denoiser, unwrapped(stored))
        found = {name: place for name, place in exact.items() if base.parameter(name) is not None} | found
    return found


def _every_vector(base: Base, stored: Mapping[str, StoredTensor]) -> Iterator[WeightPlace]:
    for name, tensor in stored.items():
        module, part = parameter_of(name)
        for place in table(base).vector_places(module) or table(base).vector_places(name) or ():
            for ending in (f".{part}", ""):
                own = place.renamed(ending)
                if (shape := base.parameter(own.layer)) is not None:
                    flat = place.rows is None and tensor.shape != shape and prod(tensor.shape) == prod(shape)
                    yield WeightPlace(
                        tensor.path, tensor.tensor, own._replace(transpose=False), shape if flat else None
                    )


def component_folders(path: Path) -> dict[str, Path]:
    """Component -> folder, for a pipeline or a single component.

    Raises PickleError for a folder of pickles, UnknownBaseError for any other folder.
    """
    folders = {c: path / c for c in COMPONENTS if _has_model(path / c)}
    if folders:
        return folders
    if not _has_model(path):
        parts = (path, *(path / c for c in COMPONENTS))
        if pickles := next(filter(None, map(only_pickles, parts)), None):
            raise pickles
        raise UnknownBaseError(f"No base model found in {path}.", fix=SPECIFY_BASE)
    return {_component_of(path): path}


def _has_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or any(folder.glob("*.safetensors*"))


def _component_of(folder: Path) -> str:
    """The component in a folder, from its name, its class or its modules."""
    if folder.name in COMPONENTS:
        return folder.name
    class_name = _class_of(_config(folder))
    if class_name.startswith("Autoencoder"):
        raise UnknownBaseError(
            f"{folder} contains a {class_name}, which adapters do not change.",
            fix="Specify a unet, transformer or text encoder.",
        )
    if "UNet" in class_name:
        return "unet"
    if "_class_name" in _config(folder):
        return "transformer"
    return "text_encoder" if class_name else component_by_content(_folder_modules(folder))


def _folder_modules(folder: Path) -> Component:
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
        raise FormatError(f"{path} is not valid JSON: {error}.", fix="Download it again.") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path} is not a model configuration.", fix="Download it again.")
    return config


def _class_of(config: Mapping[str, Any]) -> str:
    return str(config.get("_class_name") or next(iter(config.get("architectures") or ()), ""))


def _base_of_tensors(path: Path, stored: Mapping[str, StoredTensor]) -> Base | None:
    """A base model from one checkpoint: diffusers names directly, original names through the catalog; None if neither.

    Adapters are no models.
    """
    if is_adapter(stored):
        return None
    plain = _diffusers_components(stored)
    if plain:
        return named_base(plain, str(path))
    weights = weights_by_module(stored)
    found = detection.candidates({name: w.shape for name, w in weights.items()})
    for candidate in found[:4]:
        base = catalog.get(candidate.base)
        places = landed(base, stored)
        whole = {c: m for c, m in base.components.items() if all(f"{c}.{p}" in places for p in m)}
        if whole:
            return named_base({c: _as_stored(c, m, places, stored) for c, m in whole.items()}, str(path))
    return None


def _unlisted_base(path: Path, stored: Mapping[str, StoredTensor]) -> Base | None:
    """A base model with the names of its file; None for an adapter, and for a file without any layer."""
    modules = Component() if is_adapter(stored) else modules_in(unwrapped(stored))
    return named_base({component_by_content(modules): modules}, str(path)) if modules else None


def _base_of(path: Path, stored: Mapping[str, StoredTensor], *, listed_only: bool = False) -> Base:
    base = _base_of_tensors(path, stored) or (None if listed_only else _unlisted_base(path, stored))
    if base is None:
        raise UnknownBaseError(f"{path} is not a checkpoint of a base model.", fix=SPECIFY_BASE)
    return base


def _as_stored(
    component: str,
    modules: Component,
    places: Mapping[str, WeightPlaces],
    stored: Mapping[str, StoredTensor],
) -> Component:
    """The modules of the catalog with the shapes in the file: an inpainting U-Net has a wider `conv_in`."""

    def actual(path: str, module: ModuleSpec) -> ModuleSpec:
        weight = places[f"{component}.{path}"][0]
        shape = stored[weight.tensor].shape
        same = prod(shape) == prod(module.shape) or not weight.placement.plain
        return module if same else module._replace(shape=shape)

    return Component({path: actual(path, module) for path, module in modules.items()}, modules.others)


def _diffusers_components(stored: Mapping[str, StoredTensor]) -> dict[str, Component]:
    """Component -> modules, if names are those of diffusers, with a component prefix or of a single component."""
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        component, _, path = name.partition(".")
        if component in COMPONENTS:
            parts.setdefault(component, {})[path] = tensor
    found = {component: modules for component, of_one in parts.items() if (modules := modules_in(of_one))}
    if "decoder" in found and STAGE not in found["decoder"]:
        del found["decoder"]  # of an autoencoder
    if found:
        return found
    modules = modules_in(stored)
    kind = next((c for c, signs in SIGNS.items() if any(sign in modules for sign in signs)), None)
    return {kind: modules} if kind else {}


STAGE = "clip_txt_pooled_mapper"  # in both models of Stable Cascade
SIGNS: Mapping[str, tuple[str, ...]] = {  # modules that identify a single component with diffusers names
    "unet": ("mid_block.resnets.0.conv1",),
    "transformer": (
        "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn1.to_q", "joint_transformer_blocks.0.attn.to_q",
        "blocks.0.attn1.to_q", "layers.0.attention.to_q", "layers.0.attn.to_q",
        "double_stream_blocks.0.block.attn1.to_q",
    ),
    "text_encoder": ("encoder.layers.0.self_attn.q_proj", "encoder.block.0.layer.0.SelfAttention.q"),
}  # fmt: skip


def named_base(modules: Mapping[str, Mapping[str, ModuleSpec]], name: str) -> Base:
    """A base model of these modules; `family` is the equal catalog entry, if exactly one is equal."""
    base = Base(name, None, {c: m if isinstance(m, Component) else Component(m) for c, m in modules.items()})
    equal = catalog_index.bases_with(base.fingerprint) if base.denoiser else ()
    if len(equal) != 1:
        return replace(base, candidates=equal)
    return Base(name, equal[0], base.components, catalog.get(equal[0]).hub_id)
