"""Plan a write: target format and dialect, and every module in the normal form of that format."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from krona_hub.adapters.adapter import Adapter, LayerDelta, Provenance
from krona_hub.adapters.unknown_base import KEPT_NAMES, UNKNOWN
from krona_hub.bases.base import Base
from krona_hub.bases.component import Component
from krona_hub.bases.loading import load_base
from krona_hub.bases.module_spec import ModuleSpec as BaseModule
from krona_hub.bases.module_spec import OtherParameters, Placement
from krona_hub.bases.name_table import NameTable
from krona_hub.errors import (
    SPECIFY_BASE,
    AmbiguousError,
    InexpressibleError,
    KronaError,
    UnknownBaseError,
    abbreviated,
    one_of,
)
from krona_hub.formats.compatibility.applications import Application, application_named
from krona_hub.formats.forms.left_out import COMPLETE, LeftOut
from krona_hub.formats.forms.normal_forms import without_hadamard
from krona_hub.formats.known.native import KRONA
from krona_hub.formats.known.registry import storage_of
from krona_hub.formats.reading.placed_layers import joined, layer_of
from krona_hub.formats.writing.aim import Aim, kinds_of
from krona_hub.formats.writing.beside_layers import held_beside, lycoris_tensors
from krona_hub.formats.writing.encode import cast, cast_tensor, normalized
from krona_hub.formats.writing.fuse_modules import Part, fused
from krona_hub.formats.writing.module_names import check_one_component, live_path
from krona_hub.formats.writing.names_for import file_names, known_support, lost_layers
from krona_hub.formats.writing.packing import (
    Context,
    FileModule,
    FileSet,
    Tensors,
    pack,
    with_common_factors,
    with_one_rank,
)
from krona_hub.formats.writing.split_modules import Homes, split_layer
from krona_hub.formats.writing.trainer_settings import settings_of
from krona_hub.schema.native_tensors import to_tensors

PLAIN_DIALECTS = ("diffusers", "peft", "lycoris")  # canonical names, reformatted; others need the base model
SAMPLES = 12  # layers whose names are compared between base models
CLIP_PROJECTIONS = (".q_proj", ".k_proj", ".v_proj", ".out_proj")


@dataclass(frozen=True)
class WritePlan:
    """Everything needed to write the file, to measure it, and to verify it."""

    adapter: Adapter
    aim: Aim
    base: Base  # base model for reading the names back
    context: Context
    modules: Sequence[FileModule]
    stored: Mapping[str, LayerDelta]  # layer -> the delta that a reader of the file finds, in the stored numbers
    dtype: torch.dtype | None
    notes: tuple[str, ...]
    vectors: Mapping[str, Tensor]  # that the file holds, as stored
    left_out: LeftOut = COMPLETE

    @property
    def vector_error(self) -> float:
        """Relative error of the stored vectors, over all of them: that of a conversion to another dtype."""
        pairs = [(self.adapter.vectors[name].double(), v.double()) for name, v in self.vectors.items()]
        whole = sum(float(meant.square().sum()) for meant, _ in pairs)
        lost = sum(float((meant - stored).square().sum()) for meant, stored in pairs)
        return sqrt(lost / whole) if whole else 0.0

    def packed(self) -> FileSet:
        """The files, with the provenance of the adapter."""
        if self.aim.format == KRONA.name:
            return FileSet({"": Tensors(*to_tensors(replace(self.adapter, layers=self.stored, vectors=self.vectors)))})
        return pack(self.aim.format, self.modules, self.context)

    def with_provenance(self, provenance: Provenance) -> WritePlan:
        """The same plan for an adapter with another provenance, such as one with the measured errors."""
        return replace(self, adapter=replace(self.adapter, provenance=provenance))


def planned(adapter: Adapter, aim: Aim, base: str | Path | Base | None, dtype: torch.dtype | None) -> WritePlan:
    """Plan the file in memory, to the last bit. Raises a KronaError if the adapter cannot be written that way."""
    if aim.format == KRONA.name:
        return _native(adapter, aim, dtype)
    known = _known_base(adapter, base)
    if known is None and aim.tool is not None and (UNKNOWN in adapter.components or aim.dialect not in PLAIN_DIALECTS):
        raise _unnamed_for(aim.tool)
    doubtful = adapter.base.names if adapter.base is not None and base is None else ()
    known = _supported_base(adapter, aim, doubtful) or known
    names = file_names(aim, known, adapter)
    check_one_component(adapter.components, aim.dialect)
    places = names.homes(adapter.layers)
    beside = held_beside(adapter, aim.format, aim.tool, known)
    vectors = {name: cast_tensor(vector, dtype) for name, vector in beside.vectors.items()}
    modules = with_one_rank(_modules(adapter, aim, places, names.table), aim.tool)
    modules = [m._replace(delta=cast(m.delta, dtype)) for m in modules]
    check_text_encoders(aim, modules)
    context = _context(adapter, aim, known, is_stated=base is not None)
    if storage_of(aim.format).layout == "kohya":
        tensors = lycoris_tensors(vectors, names, known)
        context = replace(context, beside={**tensors, **beside.embeddings})
    elif vectors:
        modules = _biased(modules, places, vectors)
    return WritePlan(
        adapter=adapter,
        aim=aim,
        base=known or _own_layers(adapter),
        context=context,
        modules=modules,
        stored=_stored_layers(adapter, modules, places),
        dtype=dtype,
        notes=(*_notes(adapter, aim, known, doubtful), *settings_of(aim.tool, modules)),
        vectors=vectors,
        left_out=beside.left_out,
    )


def check_names_for(adapter: Adapter, tool_name: str | None, base: str | Path | Base | None) -> None:
    """Raise UnknownBaseError for an application and a file that no known base model matches.

    The names that the application expects depend on the base model. Raises InexpressibleError for an application that
    does not run it, before anything else about it is checked.
    """
    if tool_name is None:
        return
    tool = application_named(tool_name)
    if base is None and (UNKNOWN in adapter.components or KEPT_NAMES in adapter.provenance.warnings):
        raise _unnamed_for(tool)
    is_open = base is None and adapter.base is not None and len(adapter.base.names) > 1
    known = None if is_open or tool.every_base else _known_base(adapter, base)
    if known is not None:
        known_support(tool, known, kinds_of(adapter))


def without_lost_layers(adapter: Adapter, aim: Aim, base: str | Path | Base | None) -> Adapter:
    """The adapter without the layers that the application does not find, which are recorded as left out.

    An adapter of which no layer would remain is returned as it is: `planned` refuses it.
    """
    known = _known_base(adapter, base)
    lost = lost_layers(aim, known, adapter.layers) if known is not None else ()
    if not lost or len(lost) == len(adapter.layers):
        return adapter
    kept = {layer: delta for layer, delta in adapter.layers.items() if layer not in lost}
    skipped = replace(adapter.provenance, skipped=(*adapter.provenance.skipped, *lost))
    return replace(adapter.with_layers(kept), provenance=skipped)


def _unnamed_for(tool: Application) -> UnknownBaseError:
    return UnknownBaseError(
        f"The base model of the adapter is unknown; the module names that {tool.title} expects depend on it.",
        fix=f"{SPECIFY_BASE} Or choose a format with --to, which keeps the names of the file.",
    )


def _native(adapter: Adapter, aim: Aim, dtype: torch.dtype | None) -> WritePlan:
    stored = {layer: cast(without_hadamard(delta), dtype) for layer, delta in adapter.layers.items()}
    vectors = {name: cast_tensor(vector, dtype) for name, vector in adapter.vectors.items()}
    modules = [FileModule(layer, layer.partition(".")[0], layer, delta) for layer, delta in stored.items()]
    left_out = LeftOut(adapter.provenance.skipped, adapter.provenance.skipped_vectors)
    notes = (KEPT_NAMES,) if UNKNOWN in adapter.components else ()
    return WritePlan(adapter, aim, _own_layers(adapter), Context(), modules, stored, dtype, notes, vectors, left_out)


def _stored_layers(
    adapter: Adapter, modules: Sequence[FileModule], places: Mapping[str, Homes]
) -> dict[str, LayerDelta]:
    """Take the modules of the file apart again, as a reader does."""
    deltas = {m.name: m.delta for m in modules}

    def stored(layer: str, shape: tuple[int, ...]) -> LayerDelta:
        written = [home for home in places[layer] if home.module in deltas]
        parts = [(home.placement, layer_of(deltas[home.module], home.placement, shape)) for home in written]
        return joined(parts, shape)

    return {layer: stored(layer, delta.weight_shape) for layer, delta in adapter.layers.items()}


def _biased(
    modules: Sequence[FileModule], places: Mapping[str, Homes], vectors: Mapping[str, Tensor]
) -> list[FileModule]:
    """The modules with a bias each, zero where none is known, since PEFT's lora_bias applies to all of them."""
    known = {places[name.removesuffix(".bias")][0].module: vector for name, vector in vectors.items()}
    example = next(iter(known.values()))
    return [
        m._replace(bias=known.get(m.name, torch.zeros(m.delta.weight_shape[0], dtype=example.dtype))) for m in modules
    ]


def _known_base(adapter: Adapter, base: str | Path | Base | None) -> Base | None:
    """The given base model, else the one recorded in the adapter."""
    if isinstance(base, Base):
        return base
    source = base if base is not None else (adapter.base.family if adapter.base else None)
    return None if source is None else load_base(source)


def _own_layers(adapter: Adapter) -> Base:
    """A base model of the adapted layers and vectors only, for reading canonical names back."""
    modules: dict[str, dict[str, BaseModule]] = defaultdict(dict)
    for layer, delta in adapter.layers.items():
        component, _, path = layer.partition(".")
        modules[component][path] = BaseModule(delta.weight_shape)
    norms: dict[str, dict[str, BaseModule]] = defaultdict(dict)
    bare: dict[str, dict[str, BaseModule]] = defaultdict(dict)
    for name, vector in adapter.vectors.items():
        component, _, path = name.partition(".")
        module, _, last = path.rpartition(".")
        if last not in ("weight", "bias") or vector.ndim != 1:
            bare[component][path] = BaseModule(tuple(vector.shape), bias=False)
        elif module not in modules[component]:
            norms[component][module] = BaseModule(tuple(vector.shape))
    components = {c: Component(modules[c], partial(OtherParameters, norms[c], bare[c])) for c in adapter.components}
    return Base("the adapter's own layers", None, components)


def _modules(adapter: Adapter, aim: Aim, places: Mapping[str, Homes], names: NameTable | None) -> list[FileModule]:
    """The modules of the file, in the normal form of its format."""
    modules, tool = [], aim.tool.name if aim.tool else None
    for name, delta in gathered(adapter.layers, places).items():
        layer, home = next((x, h) for x in adapter.layers for h in places[x] if h.module == name)
        label = layer if len(home.siblings) == 1 and not home.placement.part else name
        stored = normalized(delta, aim.format, tool, layer=label)
        modules.append(FileModule(name, layer.partition(".")[0], live_path(layer, names), stored))
    return with_common_factors(aim.format, modules)


def check_text_encoders(aim: Aim, modules: Sequence[FileModule]) -> None:
    """Reject, for diffusers, text encoders that its pipelines fail on or silently ignore.

    Pipelines load a CLIP only if one of its attention projections is adapted ("Could not automatically infer state
    dict type", 0.42.1), and no other kind of text encoder.
    """
    if aim.tool is None or aim.tool.name != "diffusers" or aim.format != "diffusers-lora":
        return
    for component in sorted({m.component for m in modules if m.component.startswith("text_encoder")}):
        paths = [m.path for m in modules if m.component == component]
        if not any(path.endswith(CLIP_PROJECTIONS) for path in paths):
            raise InexpressibleError(
                f"diffusers pipelines load {component} only if a CLIP attention projection is adapted, not {paths[0]}.",
                fix="Use --to peft-lora and load the text encoder with text_encoder.load_adapter.",
            )


def gathered(layers: Mapping[str, LayerDelta], places: Mapping[str, Homes]) -> dict[str, LayerDelta]:
    """Module of the file -> delta of its layer, reordered, fused with its siblings or split as the file requires."""
    members: dict[str, list[Part]] = {}
    siblings: dict[str, Sequence[Placement]] = {}
    for layer, delta in layers.items():
        for home, own in split_layer(delta, places[layer]):
            members.setdefault(home.module, []).append((home.placement, own))
            siblings[home.module] = home.siblings
    return {name: fused(name, parts, siblings[name]) for name, parts in members.items()}


def split_layers(adapter: Adapter, aim: Aim, base: str | Path | Base | None) -> dict[str, dict[str, LayerDelta]]:
    """Layer -> module -> delta, for the layers that several modules of the file together store."""
    places = _named_homes(adapter, aim, base)
    return {
        layer: {home.module: own for home, own in split_layer(delta, places[layer])}
        for layer, delta in adapter.layers.items()
        if layer in places and places[layer][0].placement.part
    }


def fused_layers(adapter: Adapter, aim: Aim, base: str | Path | Base | None) -> dict[str, LayerDelta]:
    """Layer -> the delta of the module that fuses it with others, for modules that can be expressed."""
    places = _named_homes(adapter, aim, base)
    shared = {x: delta for x, delta in adapter.layers.items() if x in places and len(places[x][0].siblings) > 1}
    module_of = {x: places[x][0].module for x in shared}
    whole: dict[str, LayerDelta] = {}
    for module in dict.fromkeys(module_of.values()):
        with suppress(InexpressibleError):
            whole |= gathered({x: delta for x, delta in shared.items() if module_of[x] == module}, places)
    return {x: whole[module] for x, module in module_of.items() if module in whole}


def _named_homes(adapter: Adapter, aim: Aim, base: str | Path | Base | None) -> Mapping[str, Homes]:
    """Layer -> its modules in the file; {} if their names do not depend on the base model."""
    known = _known_base(adapter, base)
    if known is None or aim.format == KRONA.name:
        return {}
    return file_names(aim, known, adapter).homes(adapter.layers)


def _context(adapter: Adapter, aim: Aim, base: Base | None, *, is_stated: bool) -> Context:
    own = adapter.base
    stated = base.family if base and is_stated and not base.candidates else None
    only = own.family if own and own.is_certain else None  # one of several base models is not named
    is_open = own is not None and len(own.names) > 1 and not is_stated
    return Context(
        family=stated or only,
        base_id=None if is_open else (base.hub_id if base else None) or (own.hub_id if own else None),
        metadata=adapter.provenance.metadata,
        trigger_words=adapter.provenance.trigger_words,
        others={c: modules.keys() for c, modules in base.components.items()} if base else {},
        application=aim.tool,
    )


def _notes(adapter: Adapter, aim: Aim, base: Base | None, names: Sequence[str]) -> tuple[str, ...]:
    """Notes on how to load the file, and on what is not known about that; `names` are base models in doubt."""
    if base is None:
        lost = [component for component in adapter.components if component != UNKNOWN] if aim.is_folder else []
        return (KEPT_NAMES, *(f"PEFT names no component: read it with --component {component}" for component in lost))
    notes = [f"the base model is not certain: {one_of(names)}; --base settles it"] if len(names) > 1 else []
    if aim.tool is not None and aim.format in aim.tool.notes:
        notes.append(aim.tool.notes[aim.format])
    return tuple(notes)


def _supported_base(adapter: Adapter, aim: Aim, names: Sequence[str]) -> Base | None:
    """The first of the base models in doubt that the application runs; None without doubt, or if it runs none.

    Raises AmbiguousError if the application calls the modules of those that it runs by different names.
    """
    if aim.tool is None or len(names) < 2:
        return None
    called = {name: found for name in names if (found := _called(adapter, aim, name)) is not None}
    if len(set(called.values())) > 1:
        every = one_of(list(called), most=len(called))
        raise AmbiguousError(
            f"The adapter may be for {every}, whose modules {aim.tool.title} calls by different names.",
            fix=f"Specify the base model with --base, e.g. --base {next(iter(called))}.",
        )
    return load_base(next(iter(called))) if called else None


def _called(adapter: Adapter, aim: Aim, name: str) -> tuple[str, ...] | None:
    """The names of some modules of the adapter for a base model; None if the application does not load them."""
    layers = list(adapter.layers)[:: max(1, len(adapter.layers) // SAMPLES)]
    try:
        found = file_names(aim, load_base(name), adapter).homes(layers)
    except InexpressibleError:
        return None
    except KronaError:
        return (name,)
    return tuple(home.module for layer in layers for home in found[layer])


def check_nothing_left_out(plan: WritePlan, *, allow_missing: bool) -> None:
    """Raise InexpressibleError if the file would leave out a part of the adapter, unless that is allowed.

    A file without any layer or vector is never allowed: no reader takes it for an adapter.
    """
    where = plan.aim.tool.title if plan.aim.tool else plan.aim.format
    if plan.aim.format != KRONA.name and not plan.modules and not plan.vectors:
        raise InexpressibleError(
            f"{where} has no place for any part of the adapter, so that the file would be empty.",
            fix="Use --to krona, which stores everything, or merge the adapter into its base model.",
        )
    skipped = plan.adapter.provenance.skipped_vectors  # reading has already allowed to skip them, and modules
    vectors = tuple(name for name in plan.left_out.vectors if name not in skipped)
    without_place = replace(plan.left_out, modules=(), vectors=vectors)
    if not without_place or allow_missing:
        return
    raise InexpressibleError(
        f"{where} has no place for {without_place} of the adapter ({abbreviated(without_place.names)}).",
        fix="Add --allow-missing to leave them out, use --to krona, which stores everything, or merge the adapter into "
        "its base model.",
    )
