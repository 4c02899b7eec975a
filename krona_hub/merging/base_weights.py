"""A base model on disk: its files, and where the weight of each layer lies in them. Headers only, torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from krona_hub.assets.shipped import folder_of
from krona_hub.bases import catalogue
from krona_hub.bases.base import Base
from krona_hub.bases.loading import component_folders, load_base, open_checkpoint, plainly_placed, weight_files
from krona_hub.bases.weight_files import WeightPlace, indices_of, sets_of, stored_in
from krona_hub.checkpoints.header import FLOATS, Header, read_header
from krona_hub.errors import (
    FormatError,
    IncompleteError,
    KronaError,
    NotFoundError,
    PickleError,
    StructureError,
    UnknownBaseError,
    UnsupportedError,
)

EIGHT_BITS = ("F8_E4M3", "F8_E5M2")  # plain casts: read and merged, with the loss told
QUANTISED = {  # what a tensor's name ends with -> how its weights are stored
    ".quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes fp4",
    ".quant_map": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes int8",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".scale_weight": "scaled fp8",
    ".weight_scale": "scaled fp8 or int8",
    ".weight_scale_2": "nvfp4",
    ".wscales": "SVDQuant (Nunchaku)",
    "scaled_fp8": "scaled fp8",
}
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
_ADVICE = "Merge into the model in bf16 or fp16 and quantise the result, or load the adapter beside the quantised base."


@dataclass(frozen=True, eq=False)
class BaseTree:
    """What a base is on disk."""

    root: Path  # a safetensors file, or a folder
    base: Base
    headers: Mapping[Path, Header]  # of its weight files
    places: Mapping[str, tuple[WeightPlace, ...]]
    """Canonical layer -> every tensor that holds its weight: one for each variant (`fp16` beside the plain one)."""
    quantised: Mapping[Path, str] = field(default_factory=dict)
    """Folder or file -> how weights in it are quantised; other weights may lie beside them."""

    @property
    def is_folder(self) -> bool:
        return self.root.is_dir()

    def quantisation(self, place: WeightPlace) -> str | None:
        """How one weight is quantised; None where it is stored as it is."""
        if place.path.parent in self.quantised:
            return self.quantised[place.path.parent]
        tensors = self.headers[place.path].tensors
        if tensors[place.tensor].dtype not in (*FLOATS, *EIGHT_BITS):
            return f"stored as {tensors[place.tensor].dtype}"
        if place.path not in self.quantised:
            return None
        names = (place.tensor, place.tensor.removesuffix(".weight"))
        return next((kind for end, kind in QUANTISED.items() if any(name + end in tensors for name in names)), None)

    @property
    def beside(self) -> list[Path]:
        """Checkpoints of the whole model that lie in a pipeline folder beside its components."""
        if not self.is_folder or any(path.parent == self.root for path in self.headers):
            return []
        return sorted(path for path in self.root.iterdir() if path.suffix in (".safetensors", ".ckpt"))

    @cached_property
    def nbytes(self) -> int:
        return sum(header.file_size for header in self.headers.values())


def open_tree(base: str | Path) -> BaseTree:
    """The files of a local base: a checkpoint file, a component folder or a pipeline folder.

    Raises NotFoundError, UnknownBaseError where there is no model or only the name of one, UnsupportedError for
    quantised weights, PickleError where there are only pickles, IncompleteError for missing shards, StructureError for
    an index that does not tell the truth.
    """
    root = folder_of(base)
    if not root.exists():
        raise _no_weights(str(base))
    if not root.is_dir():
        return _of_file(root)
    folders = component_folders(root)
    configured = {folder: kind for folder in folders.values() if (kind := _configured(folder / "config.json"))}
    sets = {component: _sets(folder) for component, folder in folders.items()}
    if not any(sets.values()):
        raise _only_others(root, folders.values(), configured)
    headers = _headers(path for files in sets.values() for some in files for path in some)
    places = _gathered(sets)
    if len(headers) == 1 and not (root / "config.json").exists():
        _check_no_checkpoint(root, next(iter(headers)), places)
    return BaseTree(root, load_base(root), headers, places, {**configured, **_signs(headers)})


def _of_file(path: Path) -> BaseTree:
    if path.suffix == ".gguf":
        raise quantised(path, "GGUF")
    headers = _headers([path])
    signs = _signs(headers)
    try:
        base, places = open_checkpoint(path)
        return BaseTree(path, base, headers, {layer: (place,) for layer, place in places.items()}, signs)
    except UnknownBaseError as error:
        raise (quantised(path, signs[path]) if signs else error) from None


def _headers(paths: Iterable[Path]) -> dict[Path, Header]:
    return {path: read_header(path) for path in sorted(set(paths))}


def _gathered(sets: Mapping[str, tuple[tuple[Path, ...], ...]]) -> dict[str, tuple[WeightPlace, ...]]:
    found: dict[str, tuple[WeightPlace, ...]] = {}
    for component, variants in sets.items():
        for files in variants:
            for layer, place in plainly_placed(component, stored_in(files)).items():
                found[layer] = (*found.get(layer, ()), place)
    return found


def _no_weights(said: str) -> KronaError:
    if catalogue.find(said) is not None:
        return UnknownBaseError(
            f"{said} is the name of a base; here its weights are needed.",
            fix="Give its diffusers folder, its checkpoint file, or its Hub id (ns/name).",
        )
    return NotFoundError(f"{said}: no such file or folder.", fix="Check the path.")


# --- folders ---------------------------------------------------------------------------------------------------------


def _sets(folder: Path) -> tuple[tuple[Path, ...], ...]:
    """The files of each variant of a component. Raises StructureError for an index that is wrong about its shards."""
    sets = sets_of(folder)
    for index in indices_of(folder):
        _check_index(index)
    return sets


def _check_index(index: Path) -> None:
    said: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
    shards = {name: read_header(index.parent / Path(name).name) for name in set(said.values())}
    lost = [f"{t} in {s}" for t, s in said.items() if t not in shards[s].tensors]
    unsaid = [f"{t} of {s}" for s, header in shards.items() for t in header.tensors if said.get(t) != s]
    if lost or unsaid:
        cause = f"names {lost[0]}, where it is not" if lost else f"does not name {unsaid[0]}"
        raise StructureError(f"{index} {cause}.", fix="Download the folder again.")


def _check_no_checkpoint(root: Path, file: Path, places: Mapping[str, object]) -> None:
    """Raise where a folder without configuration holds a checkpoint in its authors' names, and not a component."""
    try:
        held = weight_files(file)
    except UnknownBaseError:
        return
    if not held.keys() & places.keys():
        raise UnknownBaseError(
            f"{root} is no diffusers folder, but one with a checkpoint in it.", fix=f"Give the file itself: {file}."
        )


def _only_others(root: Path, folders: Iterable[Path], configured: Mapping[Path, str]) -> KronaError:
    for folder in folders:
        if folder in configured:
            return quantised(folder, configured[folder])
        for pattern in _PICKLES:
            if pickle := next(folder.glob(pattern), None):
                return PickleError(
                    f"{root} has its weights as pickles only, such as {pickle.name}.",
                    fix="Download the safetensors files, or save the model again with save_pretrained.",
                )
        if next(folder.glob("*.gguf"), None):
            return quantised(folder, "GGUF")
    return IncompleteError(f"{root} has no weights.", fix="Download its safetensors files as well.")


# --- quantised weights -----------------------------------------------------------------------------------------------


def quantised(path: Path, kind: str) -> UnsupportedError:
    """The refusal to change weights of that kind."""
    return UnsupportedError(f"{path} is quantised ({kind}): a sum has no place in it.", fix=_ADVICE)


def _configured(config: Path) -> str | None:
    """How a component is quantised by what its configuration says."""
    try:
        found: Any = json.loads(config.read_text("utf-8")).get("quantization_config") if config.exists() else None
    except (ValueError, AttributeError) as error:
        raise FormatError(f"{config} is no configuration of a model.", fix="Download it again.") from error
    return str(found.get("quant_method", "by its configuration")) if isinstance(found, dict) else None


def _signs(headers: Mapping[Path, Header]) -> dict[Path, str]:
    """File -> how some weights in it are quantised, by the tensors beside them."""
    found = {path: next(_kinds(header), None) for path, header in headers.items()}
    return {path: kind for path, kind in found.items() if kind}


def _kinds(header: Header) -> Iterator[str]:
    """By the names of tensors, which say it best, then by types."""
    for name in header.tensors:
        yield from (kind for end, kind in QUANTISED.items() if name.endswith(end))
    for name, info in header.tensors.items():
        if name.endswith(".weight") and len(info.shape) > 1 and info.dtype not in (*FLOATS, *EIGHT_BITS):
            yield f"stored as {info.dtype}"
