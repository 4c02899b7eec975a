"""Pair the tensors of two checkpoints in any layout. Reads headers only; torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import NamedTuple

from krona_hub.bases.base import Base
from krona_hub.bases.component import Component
from krona_hub.bases.loading import (
    base_in_file,
    landed,
    landed_vectors,
    load_base,
    stored_by_component,
    weight_files,
)
from krona_hub.bases.module_spec import ModuleSpec, Placement
from krona_hub.bases.name_table import table
from krona_hub.bases.target_sets import choose
from krona_hub.bases.weight_files import StoredTensor, WeightPlace, WeightPlaces, has_ema, stored_in
from krona_hub.checkpoints.header import READABLE, Header, TensorInfo, read_header
from krona_hub.errors import AmbiguousError, BaseMismatchError, UnknownBaseError, UnsupportedError, UsageError

SCALES = (".scale_weight", ".weight_scale", "scaled_fp8")  # of quantized tensors
PARTS = (".weight", ".bias", "_weight", "_bias", "")  # suffixes of tensor names after the module


class LayerPair(NamedTuple):
    """One weight in both checkpoints."""

    name: (
        str  # canonical layer; for other tensors the canonical name with `.weight` or `.bias`, or the name in the file
    )
    shape: tuple[int, ...]  # in the base model
    base: WeightPlaces
    tuned: WeightPlaces

    @property
    def size(self) -> tuple[int, int]:
        """(out, in·k…)"""
        return self.shape[0], prod(self.shape[1:])


@dataclass(frozen=True)
class Pairs:
    """What two checkpoints have in common."""

    model: Base  # of the base checkpoint, or the one that its names were resolved with
    layers: tuple[LayerPair, ...]  # linear layers and convolutions
    others: tuple[LayerPair, ...]  # norms, biases, embeddings, buffers
    only_base: tuple[str, ...]  # layers of shared components that `tuned` lacks
    only_tuned: tuple[str, ...]
    ema: bool = False  # whether a checkpoint contains EMA copies of the weights, which are not compared


@dataclass(frozen=True)
class _Side:
    """One checkpoint: the location of each tensor by canonical name."""

    path: Path
    layers: Mapping[str, WeightPlaces]
    others: Mapping[str, WeightPlaces]
    model: Base
    headers: Mapping[Path, Header]  # of every file

    def info(self, place: WeightPlace) -> TensorInfo:
        return self.headers[place.path].tensors[place.tensor]

    def shape(self, places: WeightPlaces) -> tuple[int, ...]:
        """Return the shape of `read(places)`."""
        shapes = list(map(self._shape, places))
        return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _shape(self, place: WeightPlace) -> tuple[int, ...]:
        if place.shape is not None:
            return place.shape
        shape = self.info(place).shape
        if place.placement.rows:
            shape = (place.placement.rows[1] - place.placement.rows[0], *shape[1:])
        return shape[::-1] if place.placement.transpose else shape

    @property
    def components(self) -> set[str]:
        return {layer.partition(".")[0] for layer in self.layers}


def pair_up(
    base: Path,
    tuned: Path,
    *,
    component: str | None = None,
    targets: str | Sequence[str] | None = None,
    base_name: str | Path | None = None,
) -> Pairs:
    """Pair the tensors of both checkpoints, layer by layer.

    Each may be a diffusers folder, a component folder or a file. Names unknown to the catalog are resolved with the
    modules of the other checkpoint, or of `base_name`. `targets` are named sets of layers or regular expressions.
    Raises UnknownBaseError if the names cannot be resolved, BaseMismatchError if the checkpoints have no layers in
    common or a layer differs in shape, UnsupportedError for quantized weights.
    """
    first, second = _sides(base, tuned, base_name)
    shared = _shared_components(first, second, component)
    wanted = None if targets is None else _chosen(first.model, shared, targets)

    def inside(name: str) -> bool:
        owner = name.partition(".")[0]
        return owner in shared if component or owner in first.components | second.components else True

    of_base = [name for name in first.layers if inside(name) and (wanted is None or name in wanted)]
    layers = tuple(_pair(name, first, second) for name in of_base if name in second.layers)
    if not layers:
        raise BaseMismatchError(
            f"{tuned} contains none of the {len(of_base)} layers of {base}.",
            fix="Specify the base model that it was fine-tuned from.",
        )
    both = [name for name in first.others if name in second.others and inside(name)] if wanted is None else []
    return Pairs(
        model=first.model,
        layers=layers,
        others=tuple(LayerPair(n, first.shape(first.others[n]), first.others[n], second.others[n]) for n in both),
        only_base=tuple(name for name in of_base if name not in second.layers),
        ema=any(has_ema(header.tensors) for side in (first, second) for header in side.headers.values()),
        only_tuned=tuple(n for n in second.layers if inside(n) and n not in first.layers) if wanted is None else (),
    )


def _sides(base: Path, tuned: Path, base_name: str | Path | None) -> tuple[_Side, _Side]:
    """Open both checkpoints; names that one cannot resolve by itself are resolved with the modules of the other."""
    named = None if base_name is None else load_base(base_name)
    models = {path: _model(path) for path in (base, tuned)}
    known = [m for m in (named, models[base], models[tuned]) if m is not None]
    if not known:
        raise UnknownBaseError(
            f"The layer names in {base} and {tuned} do not match any base model in the catalog.",
            fix="Specify the base model by name, one of the checkpoints as a diffusers folder, or one of them with "
            "--base-name to keep its own names.",
        )
    more = {p: m for folder in (base, tuned) if folder.is_dir() for p, m in _every_module(folder).items()}
    first, second = (_side(path, models[path] or known[0], more) for path in (base, tuned))
    return (first, second) if named is None else (replace(first, model=named), second)


def _model(path: Path) -> Base | None:
    if path.is_dir():
        return load_base(path)
    try:
        return base_in_file(path, listed_only=True)
    except UnknownBaseError:
        return None


def _every_module(folder: Path) -> dict[str, ModuleSpec]:
    """Return every module with a weight or a bias, norms included, to resolve names in other layouts."""
    return {
        f"{component}.{_split(name)[0]}": ModuleSpec(place.shape)
        for component, stored in stored_by_component(folder).items()
        for name, place in stored.items()
    }


def _side(path: Path, model: Base, more: Mapping[str, ModuleSpec]) -> _Side:
    others: dict[str, WeightPlaces]
    if path.is_dir():
        layers = {name: place for name, place in weight_files(path).items() if model.module(name) is not None}
        tensors = {
            f"{component}.{name.removeprefix('text_model.')}": place
            for component, stored in stored_by_component(path).items()
            for name, place in stored.items()
        }
        others = {name: (WeightPlace(s.path, s.tensor, Placement(name)),) for name, s in tensors.items()}
    else:
        stored = stored_in([path])
        layers, others = landed(model, stored), dict(_placed(_extended(model, more), stored))
        vectors = landed_vectors(model, stored)
        known = _tensors(vectors)
        others = {name: own for name, own in others.items() if not _tensors({name: own}) & known} | vectors
    taken = _tensors(layers)
    others = {
        name: own
        for name, own in others.items()
        if not _tensors({name: own}) & taken and not has_ema(place.tensor for place in own)
    }
    headers = {file: read_header(file) for file in {path for path, _ in taken | _tensors(others)}}
    scales = [name for header in headers.values() for name in header.tensors if name.endswith(SCALES)]
    if scales:
        raise UnsupportedError(
            f"{path} is quantized ({scales[0]}); its weights cannot be read without their scales.",
            fix="Use the checkpoint in fp16, bf16 or fp32.",
        )
    return _Side(path, layers, others, model, headers)


def _tensors(located: Mapping[str, WeightPlaces]) -> set[tuple[Path, str]]:
    return {(place.path, place.tensor) for places in located.values() for place in places}


def _extended(model: Base, more: Mapping[str, ModuleSpec]) -> Base:
    """Return the model with the norms and embeddings of the other checkpoint, so that their names resolve too."""

    def own(component: str) -> Component:
        prefix = f"{component}."
        extra = {n.removeprefix(prefix).removeprefix("text_model."): m for n, m in more.items() if n.startswith(prefix)}
        return Component({**extra, **model.components[component]}, model.components[component].others)

    return replace(model, components={c: own(c) for c in model.components})


def _placed(model: Base, stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, WeightPlaces]]:
    """Yield the canonical name, or else the name in the file, and the location of every tensor."""
    names, lone = table(model), next(iter(model.components)) if len(model.components) == 1 else None
    for name, place in stored.items():
        module, part = _split(name)
        try:
            found = names.find(module) or ()
        except AmbiguousError:
            found = ()
        for spot in found:
            yield f"{spot.layer}{part}", (WeightPlace(place.path, place.tensor, spot),)
        if not found:
            key = f"{lone}.{name.removeprefix('text_model.')}" if lone else name
            yield key, (WeightPlace(place.path, place.tensor, Placement(key)),)


def _split(tensor: str) -> tuple[str, str]:
    """Split into module and part: `norm1.weight` -> ("norm1", ".weight"), `q_bias` -> ("q", ".bias")."""
    part = next(p for p in PARTS if tensor.endswith(p))
    return tensor[: len(tensor) - len(part)], part.replace("_", ".")


def _shared_components(first: _Side, second: _Side, component: str | None) -> set[str]:
    shared = first.components & second.components
    if component is None:
        return shared
    if component not in shared:
        raise UsageError(
            f"Component {component} is not in both checkpoints.",
            fix=f"Choose one of {', '.join(sorted(shared))}." if shared else "Specify checkpoints of the same model.",
        )
    return {component}


def _chosen(model: Base, components: set[str], targets: str | Sequence[str]) -> set[str]:
    """Return the layers that the named sets and expressions select from any of the components."""
    chosen: set[str] = set()
    for target in (targets,) if isinstance(targets, str) else targets:
        picked, refusals = set[str](), []
        for component in sorted(components & set(model.components)):
            try:
                picked |= set(choose(model, component, target))
            except UsageError as error:
                refusals.append(error)
        if not picked and refusals:
            raise refusals[0]
        chosen |= picked
    return chosen


def _pair(name: str, first: _Side, second: _Side) -> LayerPair:
    """Pair one layer. Raises BaseMismatchError if the sizes differ, UnsupportedError for quantized weights."""
    own, other = first.layers[name], second.layers[name]
    for side, spot in ((side, spot) for side, places in ((first, own), (second, other)) for spot in places):
        if side.info(spot).dtype not in READABLE:
            raise UnsupportedError(
                f"{name} is {side.info(spot).dtype} in {side.path}; quantized weights have no exact difference.",
                fix="Use the checkpoint in fp16, bf16 or fp32.",
            )
    sizes = [(shape[0], prod(shape[1:])) for shape in (first.shape(own), second.shape(other))]
    if sizes[0] != sizes[1]:
        raise BaseMismatchError(
            f"{name} is {list(first.shape(own))} in {first.path} and {list(second.shape(other))} in {second.path}.",
            fix="Specify the base model that it was fine-tuned from, or exclude the layer with --targets.",
        )
    module = first.model.module(name)
    fits = module is not None and module.matrix == sizes[0]
    return LayerPair(name, module.shape if module is not None and fits else first.shape(own), own, other)
