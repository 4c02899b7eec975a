"""Locations of the weights of a model in safetensors files, from their headers. Torch-free except `read`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from krona_hub.bases import ldm_names
from krona_hub.bases.component import Component
from krona_hub.bases.module_spec import ModuleSpec, OtherParameters, Placement, other_parameters
from krona_hub.checkpoints.file_names import ADAPTER_PICKLES
from krona_hub.checkpoints.header import Header, read_header
from krona_hub.errors import FormatError, IncompleteError, PickleError

if TYPE_CHECKING:
    from torch import Tensor

TABLES = (  # two-dimensional weights of embeddings, which are not layers
    "token_embedding", "position_embedding", "embed_tokens", "embed_positions", "shared", "relative_attention_bias",
    "word_embeddings", "position_embeddings", "token_type_embeddings", "class_embedding", "positional_embedding",
)  # fmt: skip
EMA = "model_ema."  # copies of the weights, averaged during training, in checkpoints with ldm names
SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
BUFFERS = ("position_ids",)
PARAMETERS = {  # end of a tensor name -> parameter of its module
    ".weight": "weight", ".scale": "weight", "_weight": "weight", ".bias": "bias", "_bias": "bias",
}  # fmt: skip
SUFFIXES = (".weight", "_weight", "")  # `attn.in_proj_weight` and the bare `text_projection` of OpenCLIP

LDM = "model.diffusion_model."  # beside it, such a checkpoint may contain a VAE and text encoders
WRAPPERS = (  # of all names of a model that the catalog does not list
    LDM,
    "diffusion_model.",
    "net.",
    "model.",
    "transformer.",
    "unet.",
)
ADAPTER_KEYS = re.compile(r"[._]lora[._](up|down|A|B)\b|\.(lokr|hada)_w[12]|\.kron_[ab]\b|\.kron_[ab]_")
UNET_BLOCKS = ("down_blocks.", "up_blocks.", "input_blocks.", "output_blocks.")


class StoredTensor(NamedTuple):
    """The location and shape of a tensor in a file."""

    path: Path
    tensor: str
    shape: tuple[int, ...]


class WeightPlace(NamedTuple):
    """The location of the base weight of a layer, of some of its rows, or of another parameter, in a tensor."""

    path: Path
    tensor: str
    placement: Placement
    shape: tuple[int, ...] | None = None  # of the parameter, if the file stores it in another shape


WeightPlaces = tuple[WeightPlace, ...]  # all of one weight: one, or several that fill its rows, in order


def stored_in(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Tensor name -> location, for the files of one model. Reads headers only."""
    return {
        name: StoredTensor(path, name, info.shape)
        for path in files
        for name, info in header_of_model(path).tensors.items()
    }


def header_of_model(path: Path) -> Header:
    """Read the header of a file of a model. Raises the errors of `read_header`, with the way to convert a pickle."""
    try:
        return read_header(path)
    except PickleError:
        raise PickleError(
            f"{path} is a pickle (.ckpt, .pt, .bin), which krona never loads because it can execute code.",
            fix="Convert it to safetensors, for example with diffusers: StableDiffusionPipeline.from_single_file(FILE)"
            ".save_pretrained(FOLDER), with the pipeline class of the model; then specify FOLDER.",
        ) from None


def only_pickles(folder: Path) -> PickleError | None:
    """Return the error for a component folder with weights as pickles and none as safetensors, None for others."""
    if any(folder.glob("*.safetensors")):
        return None
    pickle = next((path for path in sorted(folder.glob("*")) if path.suffix in ADAPTER_PICKLES), None)
    if pickle is None:
        return None
    return PickleError(
        f"{folder} contains weights only as pickles, such as {pickle.name}, which krona never loads.",
        fix="Download the safetensors files, or convert the model with diffusers: DiffusionPipeline.from_pretrained"
        "(FOLDER).save_pretrained(NEW_FOLDER) writes safetensors.",
    )


def files_of(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a component folder: the shards of its index, or a single file.

    Prefers the default variant over others (`fp16`, `non_ema`). Returns () without weights.
    """
    heads = _heads(folder)
    if not heads:
        _check_indexed(folder, ())
    return _set_of(heads[0]) if heads else ()


def sets_of(folder: Path) -> tuple[tuple[Path, ...], ...]:
    """The files of each variant of a component, the default variant first: its shards, or a single file.

    Raises IncompleteError if a shard or an index is missing.
    """
    sets = [_set_of(head) for head in _heads(folder)]
    shards = {path for files in sets if len(files) > 1 for path in files}
    sets = [files for files in sets if len(files) > 1 or files[0] not in shards]
    _check_indexed(folder, sets)
    return tuple(sets)


def _check_indexed(folder: Path, sets: Iterable[tuple[Path, ...]]) -> None:
    loose = set(folder.glob("*.safetensors")).difference(*sets)
    if loose:
        raise IncompleteError(
            f"No index lists the shard {min(loose)}.", fix="Download its *.safetensors.index.json file."
        )


def indices_of(folder: Path) -> list[Path]:
    """The index files of a component: `x.safetensors.index.json`, for a variant `x.safetensors.index.fp16.json`."""
    return sorted(folder.glob("*.safetensors.index*.json"))


def _heads(folder: Path) -> list[Path]:
    """The index or the single file of each variant, the default variant first."""
    wholes = [path for path in folder.glob("*.safetensors") if not SHARD.search(path.name)]
    first = {path for path in indices_of(folder) if path.name.endswith(".safetensors.index.json")}
    rest = {*indices_of(folder), *wholes} - first
    return [path for heads in (first, rest) for path in sorted(heads, key=lambda path: (len(path.name), path.name))]


def _set_of(head: Path) -> tuple[Path, ...]:
    return _shards(head) if head.suffix == ".json" else (head,)


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FormatError(f"{index} is not a valid safetensors index.", fix="Download the folder again.") from error
    shards = tuple(index.parent / Path(name).name for name in names)
    missing = [p.name for p in shards if not p.exists()]
    if missing:
        raise IncompleteError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards, e.g. {missing[0]}.",
            fix="Download the missing files.",
        )
    return shards


def modules_in(stored: Mapping[str, StoredTensor]) -> Component:
    """Path -> ModuleSpec of every linear layer and convolution among the tensors, without `text_model.`.

    A convolution with one input channel is depthwise, with as many groups as outputs; a file does not reveal others.
    """
    modules = {}
    for name, place in stored.items():
        path, suffix = _module_path(name)
        if suffix == ".weight" and len(place.shape) > 1 and not _is_table(path, place.shape):
            depthwise = len(place.shape) > 2 and place.shape[1] == 1
            groups = place.shape[0] if depthwise else 1
            modules[path.removeprefix("text_model.")] = ModuleSpec(place.shape, f"{path}.bias" in stored, groups)
    return Component(modules, partial(_others_in, stored))


def _others_in(stored: Mapping[str, StoredTensor]) -> OtherParameters:
    matrices = (name for name, place in stored.items() if name.endswith(".weight") and len(place.shape) > 1)
    owners = {name.removesuffix(".weight") for name in matrices}
    return other_parameters(
        {
            name.removeprefix("text_model."): place.shape
            for name, place in stored.items()
            if name.rpartition(".")[0] not in owners and name.rpartition(".")[2] not in (*TABLES, *BUFFERS)
        }
    )


def parameter_of(tensor: str) -> tuple[str, str]:
    """Split a tensor name into module and parameter, whatever its authors call the latter; "" for a bare parameter.

    >>> parameter_of("norm.query_norm.scale"), parameter_of("attn.in_proj_bias"), parameter_of("blocks.0.modulation")
    (('norm.query_norm', 'weight'), ('attn.in_proj', 'bias'), ('blocks.0.modulation', ''))
    """
    ending = next((end for end in PARAMETERS if tensor.endswith(end)), "")
    return tensor[: len(tensor) - len(ending)], PARAMETERS.get(ending, "")


def _is_table(path: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and path.rpartition(".")[2] in TABLES


def has_ema(names: Iterable[str]) -> bool:
    """Whether tensors of an ldm checkpoint are EMA copies of the weights, which no application generates images with.

    >>> has_ema(["model_ema.diffusion_modeltime_embed0weight"])
    True
    """
    return any(name.startswith(EMA) for name in names)


def _module_path(tensor: str) -> tuple[str, str]:
    """Split a tensor name into module path and suffix.

    >>> _module_path("a.b.weight"), _module_path("attn.in_proj_weight"), _module_path("text_projection")
    (('a.b', '.weight'), ('attn.in_proj', '_weight'), ('text_projection', ''))
    """
    suffix = next(s for s in SUFFIXES if tensor.endswith(s))
    return tensor[: len(tensor) - len(suffix)], suffix


def weights_by_module(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Module name as in the file -> its weight, without biases, norms and embeddings."""
    named = ((_module_path(name)[0], place) for name, place in stored.items() if not name.endswith("bias"))
    return {path: place for path, place in named if len(place.shape) > 1 and not _is_table(path, place.shape)}


def whole_weights(
    found: Iterable[WeightPlace], shape_of: Callable[[str], tuple[int, ...] | None]
) -> dict[str, WeightPlaces]:
    """Gather all locations of each weight; a weight with rows in no tensor is left out.

    `shape_of` knows the shape of a layer or parameter. Of two tensors for the same rows, the second counts.
    """
    gathered: dict[str, dict[tuple[int, int] | None, WeightPlace]] = {}
    for place in found:
        gathered.setdefault(place.placement.layer, {})[place.placement.part] = place
    whole: dict[str, WeightPlaces] = {}
    for name, by_part in gathered.items():
        if None in by_part:
            whole[name] = (by_part[None],)
            continue
        parts = sorted(part for part in by_part if part)
        if sum(stop - start for start, stop in parts) == (shape_of(name) or (0,))[0]:
            whole[name] = tuple(by_part[part] for part in parts)
    return whole


def read(places: WeightPlaces) -> Tensor:
    """Read a base weight in its stored dtype: only its rows, with halves and axes in canonical order."""
    import torch

    return _read(places[0]) if len(places) == 1 else torch.cat([_read(place) for place in places])


def _read(place: WeightPlace) -> Tensor:
    import torch
    from safetensors import safe_open

    _, rows, swap_halves, transpose, *_ = place.placement
    with safe_open(place.path, framework="pt") as file:
        stored: Tensor = file.get_slice(place.tensor)[rows[0] : rows[1]] if rows else file.get_tensor(place.tensor)
    weight = stored if place.shape is None else stored.reshape(place.shape)
    if transpose:
        weight = weight.mT
    if swap_halves:
        weight = torch.cat(weight.chunk(2)[::-1])
    return weight.contiguous()


def unwrapped(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of the denoiser by their names without the wrapper that all of them share.

    >>> from pathlib import Path
    >>> place = StoredTensor(Path("x"), "net.a.weight", (2, 3))
    >>> list(unwrapped({"net.a.weight": place, "net.b.weight": place}))
    ['a.weight', 'b.weight']
    """
    own = {name: tensor for name, tensor in stored.items() if name.startswith(LDM)} or dict(stored)
    wrapper = next((text for text in WRAPPERS if all(name.startswith(text) for name in own)), "")
    return {name.removeprefix(wrapper): tensor for name, tensor in own.items()}


def is_adapter(names: Iterable[str]) -> bool:
    """Return whether the tensors are those of an adapter.

    >>> is_adapter(["a.to_q.lora_down.weight"]), is_adapter(["a.to_q.weight", "a.lora_proj.weight"])
    (True, False)
    """
    return any(ADAPTER_KEYS.search(name) for name in names)


def component_by_content(modules: Component) -> str:
    """Return the component that the modules look like; a transformer unless they show another."""
    if ldm_names.is_unet(modules) or sum(any(m.startswith(b) for m in modules) for b in UNET_BLOCKS) > 1:
        return "unet"
    return "text_encoder" if modules.kind else "transformer"
