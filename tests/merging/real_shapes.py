"""Checkpoints with the names and shapes of real bases that take no room: a header, and zeros that no disk stores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType

from krona_hub.bases import catalog
from krona_hub.bases.module_spec import Placement, stored_height
from krona_hub.bases.name_table import table
from krona_hub.checkpoints.tensor_entries import DTYPE_BITS

Tensors = Mapping[str, tuple[int, ...]]
VAE = {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3), "first_stage_model.decoder.conv_in.bias": (512,)}
CLIP_L = {"sd15": "cond_stage_model.transformer.text_model.", "sdxl": "conditioner.embedders.0.transformer.text_model."}
OPENCLIP = "conditioner.embedders.1.model."


def write(path: Path, tensors: Tensors, dtype: str = "F16", metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file of zeros: sparse, so that it takes its header on disk, whatever its size."""
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def ldm_file(path: Path, name: str, dtype: str = "F16", more: Tensors = MappingProxyType({})) -> Path:
    """`sd15` or `sdxl` as one file: U-Net and text encoders under the names of ldm and sgm, a VAE, and `more`."""
    tensors = dict(VAE) | dict(more) | _originals(name, "unet", "model.diffusion_model.")
    encoder = catalog.get(name).components["text_encoder"]
    tensors |= {f"{CLIP_L[name]}{path}.weight": module.shape for path, module in encoder.items()}
    if name == "sdxl":
        tensors |= _originals(name, "text_encoder_2", OPENCLIP)
    return write(path, tensors, dtype)


def bfl_file(path: Path, name: str = "flux1-dev", dtype: str = "BF16") -> Path:
    """FLUX as Black Forest Labs publish it: the transformer alone, with fused modules."""
    return write(path, _originals(name, "transformer", ""), dtype)


def folder(path: Path, name: str, *components: str, dtype: str = "F16") -> Path:
    """Components of a base as a diffusers folder, one file each."""
    files = {"unet": "diffusion_pytorch_model", "transformer": "diffusion_pytorch_model"}
    for component in components:
        modules = catalog.get(name).components[component]
        tensors = {f"{p}.weight": m.shape for p, m in modules.items()}
        write(path / component / f"{files.get(component, 'model')}.safetensors", tensors, dtype)
        (path / component / "config.json").write_text("{}")
    (path / "model_index.json").write_text("{}")
    return path


def _originals(name: str, component: str, prefix: str) -> dict[str, tuple[int, ...]]:
    """Tensors of a component under the names of its authors."""
    originals = table(catalog.get(name)).parts[component].originals
    stored = {}
    for module, places in originals.items():
        own = prefix + module.removeprefix("openclip.")
        stored[_tensor(own)] = _stored_shape(name, places)
    return stored


def _tensor(module: str) -> str:
    """OpenCLIP keeps q, k and v in a bare parameter, as its text projection."""
    if module.endswith(".in_proj"):
        return f"{module}_weight"
    return module if module.endswith("text_projection") else f"{module}.weight"


def _stored_shape(name: str, places: tuple[Placement, ...]) -> tuple[int, ...]:
    layers = [module for p in places if (module := catalog.get(name).module(p.layer))]
    height = stored_height(places, [p.height(module) for p, module in zip(places, layers, strict=True)])
    whole = (height, *layers[0].shape[1:])
    return whole[::-1] if places[0].transpose else whole
