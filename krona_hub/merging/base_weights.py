"""A base model on disk: its files, and the location of the weight of each layer. Headers only, torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from krona_hub.assets.shipped import folder_of
from krona_hub.bases import catalog
from krona_hub.bases.base import Base
from krona_hub.bases.loading import (
    component_folders,
    landed_vectors,
    load_base,
    open_checkpoint,
    plain_vectors,
    plainly_placed,
    read,
    refuse_pickles,
)
from krona_hub.bases.weight_files import (
    StoredTensor,
    WeightPlace,
    WeightPlaces,
    header_of_model,
    indices_of,
    only_pickles,
    sets_of,
    stored_in,
    unwrapped,
)
from krona_hub.checkpoints.header import READABLE, Header, read_header
from krona_hub.errors import (
    FormatError,
    IncompleteError,
    KronaError,
    NotFoundError,
    StructureError,
    UnknownBaseError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from torch import Tensor


QUANTIZED = {  # suffix of a tensor name -> how its weights are stored
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
_ADVICE = "Merge into the model in bf16 or fp16 and quantize the result, or load the adapter at run time instead."


@dataclass(frozen=True, eq=False)
class BaseTree:
    """The files of a base model on disk."""

    root: Path  # a safetensors file, or a folder
    base: Base
    headers: Mapping[Path, Header]  # of its weight files
    places: Mapping[str, tuple[WeightPlaces, ...]]
    """Canonical layer -> the location of its weight in each variant (such as `fp16` and the default)."""
    quantized: Mapping[Path, str] = field(default_factory=dict)
    """Folder or file -> how weights in it are quantized; other weights in it may not be."""

    @property
    def is_folder(self) -> bool:
        return self.root.is_dir()

    @cached_property
    def vectors(self) -> Mapping[str, tuple[WeightPlaces, ...]]:
        """Canonical parameter -> its location in each variant, for biases, norms and bare parameters."""
        if not self.is_folder:
            stored = self._stored(self.headers)
            return {name: (places,) for name, places in landed_vectors(self.base, stored).items()}
        sets = {component: sets_of(folder) for component, folder in component_folders(self.root).items()}
        return _gathered(sets, lambda component, files: plain_vectors(component, self._stored(files)))

    def _stored(self, files: Iterable[Path]) -> dict[str, StoredTensor]:
        infos = ((path, name, info) for path in files for name, info in self.headers[path].tensors.items())
        return {name: StoredTensor(path, name, info.shape) for path, name, info in infos}

    def weight(self, name: str) -> Tensor | None:
        """Read the weight of a layer or another parameter; None if the base model has none, or a quantized one."""
        variants = self.places.get(name) or self.vectors.get(name, ())
        plain = (places for places in variants if not any(map(self.quantization, places)))
        found = next(plain, None)
        return read(found) if found else None

    def quantization(self, place: WeightPlace) -> str | None:
        """Return how a weight is quantized, None if it is not."""
        if place.path.parent in self.quantized:
            return self.quantized[place.path.parent]
        tensors = self.headers[place.path].tensors
        if tensors[place.tensor].dtype not in READABLE:
            return f"stored as {tensors[place.tensor].dtype}"
        if place.path not in self.quantized:
            return None
        names = (place.tensor, place.tensor.removesuffix(".weight"))
        return next((kind for end, kind in QUANTIZED.items() if any(name + end in tensors for name in names)), None)

    @property
    def beside(self) -> list[Path]:
        """Single-file checkpoints in a pipeline folder, next to its components."""
        if not self.is_folder or any(path.parent == self.root for path in self.headers):
            return []
        return sorted(path for path in self.root.iterdir() if path.suffix in (".safetensors", ".ckpt"))

    @cached_property
    def nbytes(self) -> int:
        return sum(header.file_size for header in self.headers.values())


def open_tree(base: str | Path) -> BaseTree:
    """Open a local base model: a checkpoint file, a component folder or a pipeline folder.

    Raises NotFoundError, UnknownBaseError if it is not a model or only the name of one, UnsupportedError for quantized
    weights, PickleError if the weights of the denoiser, or all, are pickles, IncompleteError for missing shards,
    StructureError for an index that does not match its shards.
    """
    root = folder_of(base)
    if not root.exists():
        raise _no_weights(str(base))
    if not root.is_dir():
        return _of_file(root)
    folders = component_folders(root)
    refuse_pickles(folders)
    configured = {folder: kind for folder in folders.values() if (kind := _configured(folder / "config.json"))}
    sets = {component: _sets(folder) for component, folder in folders.items()}
    if not any(sets.values()):
        raise _only_others(root, folders.values(), configured)
    headers = _headers(path for files in sets.values() for some in files for path in some)
    places = _gathered(sets, lambda component, files: plainly_placed(component, stored_in(files)))
    if len(headers) == 1 and not (root / "config.json").exists():
        _check_no_checkpoint(root, next(iter(headers)), places)
    return BaseTree(root, load_base(root), headers, places, {**configured, **_signs(headers)})


def _of_file(path: Path) -> BaseTree:
    if path.suffix == ".gguf":
        raise quantized(path, "GGUF")
    headers = _headers([path])
    signs = _signs(headers)
    try:
        base, places = open_checkpoint(path, listed_only=bool(signs))
        return BaseTree(path, base, headers, {layer: (own,) for layer, own in places.items()}, signs)
    except UnknownBaseError as error:
        raise (quantized(path, signs[path]) if signs else error) from None


def _headers(paths: Iterable[Path]) -> dict[Path, Header]:
    return {path: header_of_model(path) for path in sorted(set(paths))}


def _gathered(
    sets: Mapping[str, tuple[tuple[Path, ...], ...]],
    locate: Callable[[str, tuple[Path, ...]], Mapping[str, WeightPlaces]],
) -> dict[str, tuple[WeightPlaces, ...]]:
    found: dict[str, tuple[WeightPlaces, ...]] = {}
    for component, variants in sets.items():
        for files in variants:
            for name, places in locate(component, files).items():
                found[name] = (*found.get(name, ()), places)
    return found


def _no_weights(source: str) -> KronaError:
    if catalog.find(source) is not None:
        return UnknownBaseError(
            f"{source} is a catalog name; a merge requires the weights.",
            fix="Specify the diffusers folder, checkpoint file or Hub id (namespace/name) of the base model.",
        )
    return NotFoundError(f"{source} does not exist.", fix="Check the path.")


# --- folders ---------------------------------------------------------------------------------------------------------


def _sets(folder: Path) -> tuple[tuple[Path, ...], ...]:
    """Return the files of each variant of a component. Raises StructureError if an index does not match its shards."""
    sets = sets_of(folder)
    for index in indices_of(folder):
        _check_index(index)
    return sets


def _check_index(index: Path) -> None:
    listed: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
    shards = {name: read_header(index.parent / Path(name).name) for name in set(listed.values())}
    missing = [f"{t} in {s}" for t, s in listed.items() if t not in shards[s].tensors]
    unlisted = [f"{t} of {s}" for s, header in shards.items() for t in header.tensors if listed.get(t) != s]
    if missing or unlisted:
        cause = f"lists {missing[0]}, which does not contain it" if missing else f"does not list {unlisted[0]}"
        raise StructureError(f"{index} {cause}.", fix="Download the folder again.")


def _check_no_checkpoint(root: Path, file: Path, places: Mapping[str, object]) -> None:
    """Raise if a folder without configuration contains a single-file checkpoint rather than a component."""
    try:
        held = open_checkpoint(file, listed_only=True)[1]
    except UnknownBaseError:
        held = {}
        if unwrapped(stored := stored_in([file])).keys() == stored.keys():
            return
    if not held.keys() & places.keys():
        raise UnknownBaseError(
            f"{root} is not a diffusers folder; it contains a single-file checkpoint.", fix=f"Specify the file: {file}."
        )


def _only_others(root: Path, folders: Iterable[Path], configured: Mapping[Path, str]) -> KronaError:
    for folder in folders:
        if folder in configured:
            return quantized(folder, configured[folder])
        if pickles := only_pickles(folder):
            return pickles
        if next(folder.glob("*.gguf"), None):
            return quantized(folder, "GGUF")
    return IncompleteError(f"{root} contains no weights.", fix="Download its safetensors files.")


# --- quantized weights -----------------------------------------------------------------------------------------------


def quantized(path: Path, kind: str) -> UnsupportedError:
    """Return the error for quantized weights."""
    return UnsupportedError(f"{path} is quantized ({kind}); a merge cannot change its weights.", fix=_ADVICE)


def _configured(config: Path) -> str | None:
    """Return how a component is quantized according to its configuration."""
    try:
        found: Any = json.loads(config.read_text("utf-8")).get("quantization_config") if config.exists() else None
    except (ValueError, AttributeError) as error:
        raise FormatError(f"{config} is not a valid model configuration.", fix="Download it again.") from error
    return str(found.get("quant_method", "quantization_config")) if isinstance(found, dict) else None


def _signs(headers: Mapping[Path, Header]) -> dict[Path, str]:
    """Map files to how weights in them are quantized, judging by accompanying tensors."""
    found = {path: next(_kinds(header), None) for path, header in headers.items()}
    return {path: kind for path, kind in found.items() if kind}


def _kinds(header: Header) -> Iterator[str]:
    """Yield the kinds of quantization, first by tensor names, the best indication, then by dtype."""
    for name in header.tensors:
        yield from (kind for end, kind in QUANTIZED.items() if name.endswith(end))
    for name, info in header.tensors.items():
        if name.endswith(".weight") and len(info.shape) > 1 and info.dtype not in READABLE:
            yield f"stored as {info.dtype}"
