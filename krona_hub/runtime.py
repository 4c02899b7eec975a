"""Any adapter into any pipeline of diffusers: `load_into(pipe, "lokr.safetensors", scale=0.8)`.

The pipeline itself is the base whose names and shapes the file is read with, so that pruned, widened and tiny models
work as the published ones do.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from krona_hub.adapter import Adapter
from krona_hub.bases.base import Base, Module
from krona_hub.bases.locate import named_base
from krona_hub.errors import UsageError
from krona_hub.formats.files import read
from krona_hub.layers.attaching import AttachReport, attach, attached, detach
from krona_hub.layers.layer import KronLayer, core
from krona_hub.layers.places import models_of
from krona_hub.sources import resolve


def load_into(
    pipe: Any,
    source: Adapter | str | Path,
    scale: float = 1.0,
    name: str | None = None,
    *,
    component: str | None = None,
    allow_missing: bool = False,
) -> AttachReport:
    """Load an adapter into a pipeline, whatever its format: every output becomes that of W + scale · ΔW.

    `source` is a file or folder of any format that `read` knows, a Hub id, or an Adapter; `name` is for `set_scales`
    and `unload`, and is made of the file's name where it is not given. `component` settles what a file leaves open.
    `allow_missing` loads the rest where some modules are unknown or not in the pipeline; the report names them.
    `pipe.to` and `pipe.save_pretrained` go on working: the latter saves the base, without adapters. Raises what
    `read` and `attach` raise, with the pipeline unchanged.
    """
    models = models_of(pipe)
    if not models:
        raise UsageError(
            f"a {type(pipe).__name__} is no pipeline with a model that adapters are for.",
            fix="Give a pipeline of diffusers; a lone model takes attach(model, adapter).",
        )
    if isinstance(source, Adapter):
        adapter, left_out = source, tuple[str, ...]()
    else:
        path = resolve(source)
        adapter = read(path, base=base_of(pipe), component=component, allow_missing=allow_missing)
        left_out = tuple(note for note in adapter.provenance.notes if note.startswith("left out"))
    name = name or _free_name(pipe, source)
    report = attach(pipe, adapter, name, scale, component=component, allow_missing=allow_missing)
    return replace(report, notes=(*report.notes, *left_out))


def unload(pipe: Any, name: str | None = None) -> None:
    """Take one adapter, or all, out: the pipeline is exactly what it was. Raises NotFoundError for a wrong name."""
    detach(pipe, name)


def base_of(pipe: Any) -> Base:
    """The base that a pipeline in memory is: the names and shapes of its linear layers and convolutions."""
    components = {component: modules_in(model) for component, model in models_of(pipe).items()}
    return named_base(components, f"the {type(pipe).__name__}")


def modules_in(model: nn.Module) -> dict[str, Module]:
    """Path -> Module of every layer that takes an adapter; wrappers of adapters count as what they are around."""
    found: dict[str, Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        known = _module(module)
        if known is not None:
            found[name.removeprefix("text_model.")] = known
            inside = (*inside, f"{name}.")
    return found


def _module(module: nn.Module) -> Module | None:
    """What a layer is as a part of a base, None for what is no layer."""
    layer = module.base if isinstance(module, KronLayer) else module
    layer = core(layer)
    bias = getattr(layer, "bias", None) is not None
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        return Module(shape, bias, layer.groups)
    sizes = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    return Module(sizes, bias) if all(isinstance(size, int) for size in sizes) else None  # type: ignore[arg-type]


def _free_name(pipe: Any, source: Adapter | str | Path) -> str:
    """A name for the adapter: its file's, as torch allows it, with a number where it is taken."""
    stem = "adapter" if isinstance(source, Adapter) else Path(str(source)).name.removesuffix(".safetensors")
    stem = re.sub(r"\W+", "_", stem).strip("_") or "adapter"
    taken = attached(pipe)
    numbered = (f"{stem}_{n}" for n in range(2, len(taken) + 3))
    return next(name for name in (stem, *numbered) if name not in taken)
