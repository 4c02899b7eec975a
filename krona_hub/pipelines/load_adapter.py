"""Adapters of any format into a pipeline that is already in memory: `load_into`, `unload`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from krona_hub.adapters.adapter import Adapter
from krona_hub.bases.base import Base
from krona_hub.bases.loading import load_base, named_base
from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.formats.reading.reader import read
from krona_hub.layers.attaching import AttachReport, attach, detach
from krona_hub.layers.attachment import attached
from krona_hub.layers.kron_layer import core
from krona_hub.layers.module_tree import parts_of, slots_of, unwrapped
from krona_hub.sources import resolve


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
    """Load an adapter into a diffusers pipeline, or into one of its models, at a strength; nothing is merged.

    `source` is an adapter's file or folder in any format, its Hub id, or an `Adapter`. Its names are looked up in the
    modules that the pipeline has (`base`, a catalogue name or a folder, only where it was made for names that these do
    not explain). `name` is what `set_scales` and `unload` know it by: the file's name, if none is given; the report
    says. `component` and `format` settle what a file leaves open. What is no delta of a weight (embeddings, norms) is
    kept out and named in the report. Raises BaseMismatchError where modules do not fit (`allow_missing` loads the
    rest), and what `krona_hub.read` raises.
    """
    adapter = _adapter(pipe, source, component, base, allow_missing, format)
    free = name or _free_name(pipe, source)
    report = attach(pipe, adapter, free, scale, component=component, allow_missing=allow_missing)
    said = () if isinstance(source, Adapter) else adapter.provenance.notes
    return replace(report, notes=(*report.notes, *(note for note in said if " modules matched " not in note)))


def unload(pipe: Any, name: str | None = None) -> None:
    """Take an adapter out of a pipeline, or all of them: its modules and numbers are exactly what they were.

    Raises NotFoundError where no adapter has this name.
    """
    detach(pipe, name)


def base_of(pipe: Any, component: str | None = None) -> Base:
    """What a pipeline, or a model alone, is as a base: the names and shapes of its modules."""
    parts = parts_of(pipe, (), component)
    components: dict[str, dict[str, ModuleSpec]] = {c: {} for c in parts}
    for layer, slot in slots_of(parts).items():
        owner, _, path = layer.partition(".")
        inner: Any = core(unwrapped(slot.module))
        if (shape := slot.weight_shape) is not None:
            components[owner][path] = ModuleSpec(shape, inner.bias is not None, getattr(inner, "groups", 1))
    return named_base(components, f"this {type(pipe).__name__}")


def _adapter(
    pipe: Any,
    source: str | Path | Adapter,
    component: str | None,
    base: str | Path | Base | None,
    allow_missing: bool,
    format: str | None,
) -> Adapter:
    if isinstance(source, Adapter):
        return source
    known = load_base(base) if isinstance(base, str | Path) else base or _own_base(pipe, component)
    return read(resolve(source), base=known, format=format, component=component, allow_missing=allow_missing)


def _own_base(pipe: Any, component: str | None) -> Base:
    """All of a pipeline, whatever component is wanted: a file for several is read as what it is."""
    return base_of(pipe, component if isinstance(pipe, nn.Module) else None)


def _free_name(pipe: Any, source: str | Path | Adapter) -> str:
    """A name that is not taken: the file's own, with a number where there are several."""
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
