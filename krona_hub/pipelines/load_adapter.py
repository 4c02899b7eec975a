"""Load adapters of any format into a pipeline in memory, and unload them: `load_into`, `unload`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from krona_hub.adapters.adapter import Adapter
from krona_hub.adapters.unknown_base import UNKNOWN
from krona_hub.bases.base import Base
from krona_hub.bases.component import Component
from krona_hub.bases.loading import Weights, load_base, named_base
from krona_hub.bases.module_spec import ModuleSpec, OtherParameters, other_parameters
from krona_hub.formats.parsing.adapter_file import open_files
from krona_hub.formats.reading.kept_names import resolved
from krona_hub.formats.reading.reader import read_files
from krona_hub.layers.attaching import AttachReport, attach, detach
from krona_hub.layers.attachment import attached
from krona_hub.layers.kron_layer import core
from krona_hub.layers.module_tree import Owner, owners_of, parts_of, slots_of, unwrapped, weight_shape_of
from krona_hub.sources import resolve

COUNTS = re.compile(r"\d+ of \d+ (modules|vectors)\b.* matched ")  # a note of the reader that the report repeats


def load_into(
    pipe: Any,
    source: str | Path | Adapter,
    scale: float = 1.0,
    name: str | None = None,
    *,
    component: str | None = None,
    base: str | Path | Base | None = None,
    allow_missing: bool = False,
    format: str | None = None,
) -> AttachReport:
    """Load an adapter into a diffusers pipeline, or one of its models, without merging it.

    Its vectors are added to biases and norms. Embeddings are not applied; the report lists them.

    Parameters
    ----------
    pipe : diffusers pipeline or model; its modules resolve the adapter's key names
    source : file or folder in any format, Hub id, or `Adapter`
    scale : strength (default: 1.0)
    name : name for `set_scales` and `unload` (default: from the file name; see the report)
    component : component that an ambiguous file or a lone model belongs to
    base : catalog name or folder, for an adapter with key names of another layout
    allow_missing : load the modules that fit instead of raising BaseMismatchError
    format : format of an ambiguous file

    Returns
    -------
    AttachReport
        Name, adapted layers and parameters, missing ones and notes.

    Raises
    ------
    BaseMismatchError
        Some modules or vectors do not fit the pipeline. Errors of `krona_hub.read` are raised as well.

    Examples
    --------
    >>> import torch
    >>> from krona_hub.adapters.adapter import LayerDelta
    >>> from krona_hub.kron.terms import KronTerms
    >>> delta = LayerDelta((KronTerms(torch.ones(1, 2, 2), torch.ones(1, 1, 2)),), (2, 4))
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> print(load_into(model, Adapter({"unet.0": delta}), scale=0.5, name="toy"))
    toy: 1 of 1 modules
    >>> attached(model)
    {'toy': 0.5}
    """
    adapter = _adapter(pipe, source, component, base, allow_missing, format)
    free = name or _free_name(pipe, source)
    report = attach(pipe, adapter, free, scale, component=component, allow_missing=allow_missing)
    read_notes = () if isinstance(source, Adapter) else adapter.provenance.notes
    return replace(report, notes=(*report.notes, *(note for note in read_notes if not COUNTS.match(note))))


def unload(pipe: Any, name: str | None = None) -> None:
    """Remove an adapter, or all of them, and restore the modules and weights of a pipeline exactly.

    Parameters
    ----------
    pipe : diffusers pipeline or model
    name : name of the adapter; None (default) removes all

    Raises
    ------
    NotFoundError
        No adapter of this name is attached.

    Examples
    --------
    >>> import torch
    >>> from krona_hub.adapters.adapter import LayerDelta
    >>> from krona_hub.kron.terms import KronTerms
    >>> delta = LayerDelta((KronTerms(torch.ones(1, 2, 2), torch.ones(1, 1, 2)),), (2, 4))
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> _ = load_into(model, Adapter({"unet.0": delta}), name="toy")
    >>> unload(model, "toy")
    >>> attached(model)
    {}
    """
    detach(pipe, name)


def base_of(pipe: Any, component: str | None = None) -> Base:
    """Return a pipeline, or a lone model, as a base: the names and shapes of its modules and other parameters."""
    parts = parts_of(pipe, (), component)
    components: dict[str, dict[str, ModuleSpec]] = {c: {} for c in parts}
    for layer, slot in slots_of(parts).items():
        owner, _, path = layer.partition(".")
        inner: Any = core(unwrapped(slot.module))
        if (shape := slot.weight_shape) is not None:
            components[owner][path] = ModuleSpec(shape, inner.bias is not None, getattr(inner, "groups", 1))
    others = {c: partial(_others_of, c, model) for c, model in parts.items()}
    return named_base({c: Component(components[c], others[c]) for c in parts}, f"this {type(pipe).__name__}")


def _others_of(component: str, model: nn.Module) -> OtherParameters:
    """Return the parameters of a model that belong to no layer and to no embedding."""
    return other_parameters(
        {
            f"{path}.{key}".partition(".")[2]: tuple(parameter.shape)
            for path, owner in owners_of({component: model}).items()
            if weight_shape_of(owner.module) is None and not isinstance(owner.module, nn.Embedding)
            for key, parameter in owner.module._parameters.items()
            if parameter is not None
        }
    )


def _adapter(
    pipe: Any,
    source: str | Path | Adapter,
    component: str | None,
    base: str | Path | Base | None,
    allow_missing: bool,
    format: str | None,
) -> Adapter:
    if isinstance(source, Adapter) and UNKNOWN not in source.components:
        return source
    known = load_base(base) if isinstance(base, str | Path) else base or _own_base(pipe, component)
    if isinstance(source, Adapter):
        return resolved(source, known)
    path = resolve(source)
    weights = _weights_of(pipe, component)
    files = [replace(file, weights=weights) for file in open_files(path, known)]
    return read_files(files, str(path), format=format, component=component, allow_missing=allow_missing)


def _weights_of(pipe: Any, component: str | None) -> Weights:
    """Return a function from a layer, or another parameter, to its tensor in the pipeline, without adapters.

    The pipeline is walked lazily.
    """

    @cache
    def owners() -> Mapping[str, Owner]:
        return owners_of(parts_of(pipe, (), component))

    def weight(name: str) -> Tensor | None:
        path, key = (name, "weight") if name in owners() else (name.rpartition(".")[0], name.rpartition(".")[2])
        owner = owners().get(path)
        if owner is None:
            return None
        found = owner.module._parameters.get(key)  # the attribute would include the vectors of adapters
        if found is None:
            found = getattr(owner.module, key, None)
        return found if found is None or owner.rows is None else found[owner.rows[0] : owner.rows[1]]

    return weight


def _own_base(pipe: Any, component: str | None) -> Base:
    """The whole pipeline as a base, even for one component: a file may be for several."""
    return base_of(pipe, component if isinstance(pipe, nn.Module) else None)


def _free_name(pipe: Any, source: str | Path | Adapter) -> str:
    """Return the file's name, with a number appended if it is taken."""
    stem = "adapter" if isinstance(source, Adapter) else _stem(str(source))
    taken = attached(pipe)
    numbered = (f"{stem}_{i}" for i in range(2, len(taken) + 3))
    return stem if stem not in taken else next(n for n in numbered if n not in taken)


def _stem(source: str) -> str:
    """
    >>> _stem("a/toy.v1.safetensors"), _stem("ns/name@rev")
    ('toy_v1', 'name_rev')
    """
    last = source.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    return re.sub(r"\W+", "_", last.removesuffix(".safetensors")).strip("_") or "adapter"
