"""One adapter of a merge: the modules that match the base, and why others do not. Torch-free for files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from krona_hub.adapters.provenance import BaseModel
from krona_hub.bases import name_prefixes
from krona_hub.bases.base import COMPONENTS, Base
from krona_hub.bases.weight_files import WeightPlaces, only_pickles
from krona_hub.checkpoints.findings import raise_first
from krona_hub.errors import AmbiguousError, KronaError, UsageError, counted
from krona_hub.formats.known.format import Format
from krona_hub.formats.known.native import KRONA
from krona_hub.formats.known.registry import by_name, detect_format
from krona_hub.formats.parsing.adapter_file import AdapterFile, in_file, open_files
from krona_hub.formats.parsing.base_match import places_of_kept
from krona_hub.formats.parsing.vector_match import kept_parameter
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.read_plan import ReadPlan, make_plan, refuse_unreadable
from krona_hub.merging.base_weights import BaseTree
from krona_hub.schema import tensor_layout
from krona_hub.sources import resolve

if TYPE_CHECKING:
    from torch import Tensor

    from krona_hub.adapters.adapter import Adapter


Shape = tuple[int, ...]
RECORDING = (None, "krona")  # formats that record their base; for others it is inferred from names and shapes


class MergeModule(NamedTuple):
    """A module of an adapter that matches the base."""

    name: str  # in the file
    layers: tuple[str, ...]  # canonical; several if fused
    dora: bool


@dataclass(frozen=True, eq=False)
class MergeInput:
    """One adapter of a merge."""

    label: str  # path as given; "the adapter" for one in memory
    source: Adapter | Path
    weight: float
    format: str | None
    modules: tuple[MergeModule, ...]
    missing: Mapping[str, str]  # module -> why it cannot be merged
    base: BaseModel | None  # that it records
    nbytes: int
    notes: tuple[str, ...]
    files: tuple[Path, ...] = ()  # of the adapter
    plans: tuple[ReadPlan, ...] = ()  # of these files; none for a native file
    guesses: tuple[str, ...] = ()  # catalog names that fit according to its reader
    vectors: Mapping[str, tuple[WeightPlaces, ...]] = field(default_factory=dict)
    """Parameter that a vector is added to -> its location in each variant of the base."""
    missing_vectors: Mapping[str, str] = field(default_factory=dict)  # parameter -> why it cannot be merged
    target: Base | None = None  # of the merge, for a native file whose own base model was unknown

    @property
    def total(self) -> int:
        return len(self.modules) + len(self.missing)

    @property
    def total_vectors(self) -> int:
        return len(self.vectors) + len(self.missing_vectors)

    @property
    def matches(self) -> bool:
        """Whether anything of the adapter can be merged."""
        return bool(self.modules or self.vectors)

    @property
    def unmatched(self) -> Mapping[str, str]:
        """Modules and parameters that cannot be merged, and why."""
        return {**self.missing, **self.missing_vectors}

    @property
    def match_summary(self) -> str:
        """How much of the adapter matched, in words; vectors only if it has any."""
        return matched_counts(modules=(len(self.modules), self.total), vectors=(len(self.vectors), self.total_vectors))

    @property
    def layers(self) -> tuple[str, ...]:
        """The adapted layers, each once, even if several modules of the file are rows of it."""
        return tuple(dict.fromkeys(layer for module in self.modules for layer in module.layers))

    @property
    def doras(self) -> frozenset[str]:
        """The layers with a DoRA magnitude."""
        return frozenset(layer for m in self.modules if m.dora for layer in m.layers)

    def load(self) -> Adapter:
        """Load the adapter, without the modules that cannot be read."""
        from krona_hub.formats.reading.reader import read, read_planned

        if not isinstance(self.source, Path):
            return self.source
        return read_planned(self.plans, self.label) if self.plans else read(self.source, base=self.target)

    @cached_property
    def candidates(self) -> tuple[str, ...]:
        """Catalog names that it fits, whatever base was given, for messages."""
        if self.base is not None and self.base.names:
            return self.base.names
        try:
            return describe(self.source).candidates if isinstance(self.source, Path) else self.guesses
        except KronaError:
            return ()


def matched_counts(**counts: tuple[int, int]) -> str:
    """Return how many of each kind matched, as (number, total); kinds of which there are none are left out.

    >>> matched_counts(modules=(77, 77), vectors=(0, 0)), matched_counts(modules=(77, 77), vectors=(60, 64))
    ('77 of 77 modules', '77 of 77 modules and 60 of 64 vectors')
    """
    given = {kind: count for kind, count in counts.items() if count[1]} or dict([*counts.items()][:1])
    return " and ".join(f"{found} of {total} {kind}" for kind, (found, total) in given.items())


def open_input(
    source: Adapter | str | Path,
    weight: float,
    tree: BaseTree,
    *,
    component: str | None = None,
    from_format: str | None = None,
    label: str = "the adapter",
) -> MergeInput:
    """Match an adapter with the base; with `component`, only its modules of that component.

    Raises UsageError for a strength that is not finite or an unknown component, and what reading the file raises,
    except for modules that the base lacks.
    """
    if not isfinite(weight):
        raise UsageError(f"Invalid strength {weight}.", fix="Use a finite number, such as 0.8.")
    if component not in (None, *COMPONENTS):
        raise UsageError(f"Unknown component {component!r}.", fix=f"Choose one of {', '.join(COMPONENTS)}.")
    if isinstance(source, (str, Path)):
        return _of_file(source, weight, tree, component, from_format)
    return _of_adapter(source, weight, tree, component, label)


def _of_adapter(adapter: Adapter, weight: float, tree: BaseTree, component: str | None, label: str) -> MergeInput:
    from krona_hub.formats.reading.kept_names import resolved

    adapter = resolved(adapter, tree.base)
    found = (
        (MergeModule(name, (name,), delta.magnitude is not None), _why_not(name, delta.weight_shape, tree))
        for name, delta in adapter.layers.items()
    )
    modules, missing = _sorted_out(found, {}, component)
    vectors, missing_vectors = _placed({name: tuple(v.shape) for name, v in adapter.vectors.items()}, tree, component)
    guessed = adapter.provenance.source_format not in RECORDING
    return MergeInput(
        label=label,
        source=adapter,
        weight=weight,
        format=adapter.provenance.source_format,
        modules=modules,
        missing=missing,
        base=None if guessed else adapter.base,
        guesses=adapter.base.names if guessed and adapter.base else (),
        nbytes=sum(t.numel() * t.element_size() for t in _tensors(adapter)),
        notes=tuple(_extras(tuple(adapter.extras))),
        vectors=vectors,
        missing_vectors=missing_vectors,
    )


def _tensors(adapter: Adapter) -> Iterator[Tensor]:
    for delta in adapter.layers.values():
        yield from delta.tensors
    yield from adapter.vectors.values()


# --- files -----------------------------------------------------------------------------------------------------------


def _of_file(
    source: str | Path, weight: float, tree: BaseTree, component: str | None, from_format: str | None
) -> MergeInput:
    path = resolve(source)
    files = tuple(replace(file, weights=tree.weight) for file in open_files(path, tree.base))
    found = [_reading(f, tree, from_format, f.component if len(files) > 1 else component) for f in files]
    modules, missing = _sorted_out(
        (pair for reading in found for pair in reading.modules),
        {name: why for reading in found for name, why in reading.unread.items()},
        component,
    )
    shapes = {name: shape for reading in found for name, shape in reading.vectors.items()}
    vectors, missing_vectors = _placed(shapes, tree, component)
    unread = {name: why for reading in found for name, why in reading.unread_vectors.items()}
    return MergeInput(
        label=str(source),
        source=path,
        weight=weight,
        format=found[0].format,
        modules=modules,
        missing=missing,
        base=found[0].base,
        nbytes=sum(file.header.file_size for file in files),
        notes=(
            *(note for reading in found if reading.plan for note in reading.plan.notes),
            *_extras(tuple(name for reading in found for name in reading.extras)),
        ),
        files=tuple(file.path for file in files),
        plans=tuple(reading.plan for reading in found if reading.plan),
        target=tree.base if any(reading.plan is None for reading in found) else None,
        vectors=vectors,
        missing_vectors=missing_vectors | _of_component(unread, component),
    )


class _Reading(NamedTuple):
    """A file of an adapter according to its header."""

    format: str
    modules: tuple[tuple[MergeModule, str], ...]  # and why it cannot be merged, or ""
    unread: Mapping[str, str]  # names that do not match the base, and why
    extras: tuple[str, ...]
    base: BaseModel | None = None  # that it records; only native files do so reliably
    plan: ReadPlan | None = None
    vectors: Mapping[str, Shape] = {}  # parameter -> shape of what is added to it
    unread_vectors: Mapping[str, str] = {}  # keys of vectors that do not match the base, and why


def _reading(file: AdapterFile, tree: BaseTree, format: str | None, component: str | None) -> _Reading:
    with in_file(file.path):
        known = by_name(format) if format is not None else _detected(file)
        return _native(file, tree) if known is KRONA else _planned(make_plan(file, known, component), tree)


def _detected(file: AdapterFile) -> Format:
    """Detect the format; by the file alone if the base leaves it ambiguous, since it may be the wrong base."""
    try:
        return detect_format(file)
    except AmbiguousError as error:
        try:
            return detect_format(replace(file, base=None))
        except AmbiguousError:
            raise error from None


def _native(file: AdapterFile, tree: BaseTree) -> _Reading:
    known, findings = tensor_layout.examine(file.header)
    raise_first(findings, str(file.path))
    kept = places_of_kept({name: layer.weight_shape for name, layer in known.layers.items()}, tree.base)
    modules = (
        (
            MergeModule(name, tuple(place.layer for place in kept[name]), layer.magnitude is not None)
            if name in kept
            else MergeModule(name, (name,), layer.magnitude is not None),
            "" if name in kept else _why_not(name, layer.weight_shape, tree),
        )
        for name, layer in known.layers.items()
    )
    shapes = {name: file.header.tensors[tensor].shape for name, tensor in known.vectors.items()}
    vectors = {kept_parameter(name, shape, tree.base): shape for name, shape in shapes.items()}
    return _Reading("krona", tuple(modules), {}, tuple(known.extras), known.header.base, vectors=vectors)


def _planned(plan: ReadPlan, tree: BaseTree) -> _Reading:
    """Use the plan of the reader, which has already compared names and shapes with the base."""
    refuse_unreadable(plan)
    modules = []
    for module in plan.modules:
        layers = tuple(place.layer for place in module.places)
        lost = next(
            (
                f"{layer} has no weight in the base{_pickled(tree, layer)}."
                for layer in layers
                if layer not in tree.places
            ),
            "",
        )
        modules.append((MergeModule(module.group.name, layers, module.layout.dora is not None), lost))
    unread = {name: _why_unread(error) for name, error in plan.problems.items()}
    keys = {vector.key for vector in plan.file.keys.vectors}
    return _Reading(
        plan.format,
        tuple(modules),
        {name: why for name, why in unread.items() if name not in keys},
        plan.file.keys.extras,
        plan=plan,
        vectors={target.parameter: target.shape for vector in plan.vectors for target in vector.targets},
        unread_vectors={name: why for name, why in unread.items() if name in keys},
    )


def _pickled(tree: BaseTree, layer: str) -> str:
    """Return why a folder has no weight of a layer, if its component is stored only as pickles."""
    pickles = tree.is_folder and only_pickles(tree.root / layer.partition(".")[0])
    return ", which stores this component only as a pickle" if pickles else ""


def _sorted_out(
    found: Iterable[tuple[MergeModule, str]], unread: Mapping[str, str], component: str | None
) -> tuple[tuple[MergeModule, ...], dict[str, str]]:
    """Return the modules that can be merged, and why the others cannot; with `component`, only its modules."""
    wanted = [(m, why) for m, why in found if component is None or m.layers[0].startswith(f"{component}.")]
    lost = _of_component(unread, component)
    return tuple(m for m, why in wanted if not why), {m.name: why for m, why in wanted if why} | lost


def _of_component(unread: Mapping[str, str], component: str | None) -> dict[str, str]:
    """Return the unread names that may be of that component."""
    return {n: why for n, why in unread.items() if component is None or name_prefixes.may_mean(n, component)}


def _why_unread(error: KronaError) -> str:
    """Return the reason; of the reader's advice only the nearest name applies, since the base is given."""
    return f"{error.cause} {error.fix}" if error.fix.startswith("The nearest") else error.cause


def _why_not(layer: str, weight_shape: tuple[int, ...], tree: BaseTree) -> str:
    """Return why a layer cannot be merged, "" if it can."""
    module, given = tree.base.module(layer), (weight_shape[0], prod(weight_shape[1:]))
    if module is None or layer not in tree.places:
        return f"{tree.root.name} has no {name_prefixes.lacking(layer, tree.base) or 'such module'}."
    if module.matrix == given:
        return ""
    return f"its delta is {given[0]}x{given[1]}, but the weight is {module.matrix[0]}x{module.matrix[1]}."


def _extras(names: tuple[str, ...]) -> Iterator[str]:
    if names:
        yield f"{counted(len(names), 'embedding')}, such as {names[0]}, not merged"


# --- vectors ---------------------------------------------------------------------------------------------------------


def _placed(
    shapes: Mapping[str, Shape], tree: BaseTree, component: str | None
) -> tuple[dict[str, tuple[WeightPlaces, ...]], dict[str, str]]:
    """Locate the parameters that vectors are added to; also return why others cannot be merged."""
    wanted = {name: shape for name, shape in shapes.items() if component is None or name.startswith(f"{component}.")}
    places = {name: tree.vectors[name] for name in wanted if name in tree.vectors}
    missing = {name: why for name, shape in wanted.items() if (why := _why_not_added(name, shape, places, tree))}
    return {name: places[name] for name in wanted if name not in missing}, missing


def _why_not_added(name: str, shape: Shape, places: Mapping[str, tuple[WeightPlaces, ...]], tree: BaseTree) -> str:
    """Return why a vector cannot be merged, "" if it can."""
    if name not in places:
        return f"{tree.root.name} has no {name_prefixes.lacking(name, tree.base) or 'such parameter'}."
    for variant in places[name]:
        stored = _shape_at(variant, tree)
        if shape != stored:
            return f"its vector is {_words(shape)}, but the parameter is {_words(stored)}."
    return ""


def _shape_at(places: WeightPlaces, tree: BaseTree) -> Shape:
    first = places[0]
    if first.shape is not None:  # that of the parameter, which the file stores in another one
        return first.shape
    shapes = [tree.headers[place.path].tensors[place.tensor].shape for place in places]
    rows = first.placement.rows
    if rows:
        return (rows[1] - rows[0], *shapes[0][1:])
    return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _words(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a number"
