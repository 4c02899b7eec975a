"""Plan how to read a file before loading tensors: layout, scale and layers of each module. Torch-free.

`krona inspect` shows the plan; `read` executes it. A module that cannot be read is recorded with its error in
`problems`, and `refuse` decides which of these errors to raise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from krona_hub.adapters.unknown_base import KEPT_NAMES
from krona_hub.bases.base import COMPONENTS
from krona_hub.bases.families import FAMILIES, related
from krona_hub.bases.metadata_hints import bases_named
from krona_hub.bases.module_spec import Placement
from krona_hub.bases.name_table import NameTable, table
from krona_hub.checkpoints.header import READABLE
from krona_hub.checkpoints.reader import read_scalars
from krona_hub.errors import (
    AmbiguousError,
    BaseMismatchError,
    ConflictError,
    IncompleteError,
    KronaError,
    UnknownBaseError,
    UnsupportedError,
    abbreviated,
    counted,
    one_of,
)
from krona_hub.formats.known.format import Format
from krona_hub.formats.known.refusals import refuse_whole
from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.formats.parsing.base_match import BaseMatch, Placements, match_base
from krona_hub.formats.parsing.foreign import is_whole_weight, unsupported
from krona_hub.formats.parsing.keys import ModuleTensors, VectorKey
from krona_hub.formats.parsing.module_layout import ModuleLayout, layout_of
from krona_hub.formats.parsing.scales import ModuleScale, ScaleConfig, config_scale, tensor_scale
from krona_hub.formats.parsing.vector_match import VectorTarget, base_of_vectors, match_vectors
from krona_hub.formats.reading.part_checks import undefined_doras

FORGIVABLE = (IncompleteError, UnsupportedError, BaseMismatchError)  # errors that --allow-missing tolerates


@dataclass(frozen=True)
class ModulePlan:
    """How to read one module of a file."""

    group: ModuleTensors
    layout: ModuleLayout
    scale: ModuleScale
    places: Placements  # empty if the base model is unknown


@dataclass(frozen=True)
class VectorPlan:
    """How to read one vector of a file: a change of biases, norms or other parameters."""

    key: VectorKey
    targets: tuple[VectorTarget, ...]  # several for the bias of fused layers
    scale: float

    @property
    def parameters(self) -> tuple[str, ...]:
        """Canonical names of the changed parameters."""
        return tuple(target.parameter for target in self.targets)


@dataclass(frozen=True, eq=False)
class ReadPlan:
    """How to read a file."""

    file: AdapterFile
    format: str  # a name of FORMATS
    scale_rule: str
    match: BaseMatch
    modules: tuple[ModulePlan, ...]
    problems: Mapping[str, KronaError]  # module or key -> why it is not read
    notes: tuple[str, ...]
    base_error: KronaError | None = None  # why no base model was found; then no module has layers
    contradicted: tuple[str, ...] = ()  # base models that the metadata name, although names and shapes are of another
    vectors: tuple[VectorPlan, ...] = ()

    @property
    def total(self) -> int:
        """Number of modules, readable or not."""
        vectors = {vector.key for vector in self.file.keys.vectors}
        return len(self.modules) + len(self.problems.keys() - vectors)

    @property
    def matched(self) -> str:
        """How many modules matched which base model, such as "88 of 88 modules matched sd15"."""
        placed = sum(bool(m.places) for m in self.modules)
        vectors = self.file.keys.vectors
        beside = f" and {len(self.vectors)} of {counted(len(vectors), 'vector')}" if vectors else ""
        if self.match.base is None and (placed or self.vectors):
            return f"{placed} of {self.total} modules{beside} read by their own names"
        where = self.match.base.name if self.match.base else "any known base"
        return f"{placed} of {self.total} modules{beside} matched {where}"


def make_plan(file: AdapterFile, format: Format, component: str | None = None, *, lost: bool = False) -> ReadPlan:
    """Plan how to read `file` by the rules of `format`; problems of single modules are in `problems`.

    Raises errors that concern the whole file: a broken configuration, scaled fp8, and an unknown or ambiguous base
    model. With `lost`, the latter is a note instead, and the modules have no layers.
    """
    refuse_whole(file)
    layouts, scales, problems = measure(file, format)
    match, base_error = _match(file, layouts, format, component)
    if base_error is not None and not lost:
        raise base_error
    vectors, vector_problems = _vectors(file, match, scales) if base_error is None else ((), {})
    problems |= {**match.problems, **_conflicts(match), **vector_problems}
    problems = {**_without_magnitude(file, match), **problems}
    problems |= undefined_doras(match, layouts, problems)
    modules = tuple(
        ModulePlan(group, layouts[group.name], scales[group.name], match.places.get(group.name, ()))
        for group in file.keys.modules
        if group.name in layouts and group.name not in problems
    )
    contradicted = _contradicted(file, match)
    notes = (
        *([str(base_error)] if base_error else []),
        *_contradiction_note(contradicted, match),
        *format.notes(file),
        *_initial_notes(modules),
        *_scale_notes(modules),
        *_conv1d_note(modules),
        *_value_note(modules, vectors),
        *_kept_names(match, vectors),
    )
    return ReadPlan(file, format.name, format.scale, match, modules, problems, notes, base_error, contradicted, vectors)


def measure(
    file: AdapterFile, format: Format
) -> tuple[dict[str, ModuleLayout], dict[str, ModuleScale], dict[str, KronaError]]:
    """The layout and the scale of each module, independent of the base model, and the errors of the other modules."""
    problems = _leftovers(file)
    configs = format.configs(file)
    layouts: dict[str, ModuleLayout] = {}
    scales: dict[str, ModuleScale] = {}
    alphas = _alphas(file)
    for group in file.keys.modules:
        try:
            layout = layout_of(group, file.header.tensors, format.kinds.get(group.kind))
            scales[group.name] = _scale(group, layout, alphas.get(group.name), configs)
            layouts[group.name] = layout
        except KronaError as error:
            problems[group.name] = error
    return layouts, scales, problems


def _leftovers(file: AdapterFile) -> dict[str, KronaError]:
    """Errors of keys and modules that no supported grammar covers."""
    keys = file.keys
    found: dict[str, KronaError] = {}
    for name, algorithm in (keys.foreign or {}).items():
        found[name] = unsupported(algorithm)
    for key in keys.unknown:
        found[key] = _unknown(key)
    for name in keys.orphans:
        found[name] = IncompleteError("An alpha or a magnitude without a delta.", fix="Save the adapter again.")
    return found


def _unknown(key: str) -> IncompleteError:
    if is_whole_weight(key):
        return IncompleteError(
            "This is a whole weight, as in a checkpoint, not a difference from the base model.",
            fix="Use --allow-missing to skip it; `krona extract` makes an adapter of a fine-tuned model.",
        )
    return IncompleteError(
        "The key belongs to no adapter format that krona knows.", fix="Use --allow-missing to skip it."
    )


def _alphas(file: AdapterFile) -> dict[str, float]:
    """Module -> stored alpha, if it is a single floating-point number."""
    keys = {m.name: m.parts["alpha"] for m in file.keys.modules if "alpha" in m.parts}
    tensors = file.header.tensors
    sound = {name: key for name, key in keys.items() if tensors[key].numel == 1 and tensors[key].dtype in READABLE}
    values = read_scalars(file.header, sound.values())
    return {name: values[key] for name, key in sound.items()}


def _scale(
    group: ModuleTensors, layout: ModuleLayout, alpha: float | None, configs: Mapping[str, ScaleConfig]
) -> ModuleScale:
    """The scale from the configuration of the component, unless the module has its own alpha (OneTrainer)."""
    path = group.name.removeprefix("base_model.model.")
    component, _, rest = path.partition(".")
    if component in COMPONENTS and component in configs:
        config: ScaleConfig | None = configs[component]
        path = rest
    else:
        config = configs.get("")
    if alpha is not None or config is None or layout.kind in ("dense", "cdka", "value"):
        return tensor_scale(layout, alpha)
    return config_scale(config, path, layout)


def _match(
    file: AdapterFile, layouts: Mapping[str, ModuleLayout], format: Format, component: str | None
) -> tuple[BaseMatch, KronaError | None]:
    """The layers of the modules, or the error that prevents finding them."""
    nowhere = BaseMatch(None, (), {}, {})
    if not layouts and not file.keys.vectors:
        return nowhere, None
    try:
        return _match_base(file, layouts, format, component), None
    except (UnknownBaseError, AmbiguousError, BaseMismatchError) as error:
        return nowhere, error


def _match_base(
    file: AdapterFile, layouts: Mapping[str, ModuleLayout], format: Format, component: str | None
) -> BaseMatch:
    if not layouts:
        return _match_by_vectors(file, component or file.component)
    if format.match_base is not None:
        return format.match_base(file, layouts)
    shapes = {name: layout.weight_shape for name, layout in layouts.items()}
    owner, is_peft = component or file.component, file.config is not None
    return match_base(shapes, file.metadata, file.base, owner, is_peft=is_peft)


def _match_by_vectors(file: AdapterFile, component: str | None) -> BaseMatch:
    """The base model of a file without layers."""
    if file.base is not None:
        candidates = file.base.candidates or ((file.base.family,) if file.base.family else ())
        return BaseMatch(file.base, candidates, {}, {}, component)
    is_peft = file.config is not None
    return base_of_vectors(file.keys.vectors, file.header.tensors, component, is_peft=is_peft)


def _vectors(
    file: AdapterFile, match: BaseMatch, scales: Mapping[str, ModuleScale]
) -> tuple[tuple[VectorPlan, ...], dict[str, KronaError]]:
    """The plans of the vectors of a file, and the errors of the others by key."""
    found = match_vectors(file.keys.vectors, file.header.tensors, match)
    problems = dict(found.problems)
    plans = []
    for key, targets in found.targets.items():
        if key.is_scaled and key.module not in scales:
            problems[key.key] = IncompleteError("A bias without its LoRA.", fix="Save the adapter again.")
            continue
        plans.append(VectorPlan(key, targets, scales[key.module].value if key.is_scaled else 1.0))
    return tuple(plans), problems


def _conflicts(match: BaseMatch) -> dict[str, KronaError]:
    """Errors of modules that adapt the same layer, or the same rows of one, as another module."""
    owners: dict[str, list[tuple[Placement, str]]] = {}
    found: dict[str, KronaError] = {}
    for name, places in match.places.items():
        others = ((p, place, owner) for p in places for place, owner in owners.get(p.layer, ()))
        taken = next((owner for p, place, owner in others if p.overlaps(place)), None)
        if taken:
            found[name] = ConflictError(
                f"The module adapts the same layer as {taken}.", fix="Keep only one of the two adapters in the file."
            )
        for place in places:
            owners.setdefault(place.layer, []).append((place, name))
    return found


def _without_magnitude(file: AdapterFile, match: BaseMatch) -> dict[str, KronaError]:
    """Errors of modules whose DoRA magnitude has another module name: they would be read as plain LoRA without it."""
    if not file.keys.orphans or match.base is None:
        return {}
    names = table(match.base)
    lost = [(place, name) for name in file.keys.orphans for place in _placed(names, name, match.component)]
    return {
        module: IncompleteError(
            f"A magnitude or alpha of the same layer has another name, {orphan}.",
            fix="Rename the tensors, or save the adapter again with the application that trained it.",
        )
        for module, places in match.places.items()
        for place in places
        for other, orphan in lost
        if place.overlaps(other)
    }


def _placed(names: NameTable, name: str, component: str | None) -> Placements:
    return next((places for owner, places in names.candidates(name) if component in (None, owner)), ())


def refuse(plan: ReadPlan, allow_missing: bool) -> None:
    """Raise the first error in `problems` unless `allow_missing` tolerates it; raise if no module remains.

    A file for another base model is one error, not one per module.
    """
    if plan.match.mismatch and not (allow_missing and plan.modules):
        raise plan.match.mismatch
    refuse_unreadable(plan)
    if plan.problems and not allow_missing:
        raise _summary(plan.problems, plan)
    if not plan.modules and not plan.vectors:
        empty = IncompleteError("The adapter has no modules.", fix="Choose a file that contains adapter weights.")
        raise _summary(plan.problems, plan) if plan.problems else empty


def refuse_unreadable(plan: ReadPlan) -> None:
    """Raise the first error that --allow-missing does not tolerate."""
    hard = {name: e for name, e in plan.problems.items() if not isinstance(e, FORGIVABLE)}
    if hard:
        raise _summary(hard, plan)


def _summary(problems: Mapping[str, KronaError], plan: ReadPlan) -> KronaError:
    """The first problem, with the number and the names of all modules with the same problem."""
    name, error = next(iter(problems.items()))
    alike = [n for n, e in problems.items() if type(e) is type(error)]
    fix = error.fix
    if isinstance(error, FORGIVABLE) and plan.modules and "--allow-missing" not in fix:
        others = counted(len(plan.modules), "other module")
        fix = f"{fix} Use --allow-missing to read the {others}.".strip()
    keys = {vector.key for vector in plan.file.keys.vectors}
    total = plan.total + len(keys) if keys.intersection(alike) else plan.total
    kind = "modules and vectors" if keys.intersection(alike) else "modules"
    where = name if len(alike) == 1 else f"{len(alike)} of {total} {kind} ({abbreviated(alike)}): {name}"
    return type(error)(f"{where}: {error.cause}", fix=fix)


def _contradicted(file: AdapterFile, match: BaseMatch) -> tuple[str, ...]:
    """The base models that the metadata name, if the names and shapes of the file are those of others."""
    named = bases_named(file.metadata)
    known = {name for candidate in match.candidates if candidate in FAMILIES for name in related(candidate)}
    return () if not known or named & known else tuple(sorted(named))


def _contradiction_note(named: Sequence[str], match: BaseMatch) -> tuple[str, ...]:
    if not named:
        return ()
    return (
        f"the metadata name {one_of(named)}, but the names and shapes are those of {one_of(match.candidates)}, which "
        "count",
    )


def _initial_notes(modules: Iterable[ModulePlan]) -> tuple[str, ...]:
    kinds = sorted({m.scale.initial for m in modules if m.scale.initial})
    return tuple(
        f"init_lora_weights is {kind}: the first factors were subtracted from the base weights, so that the deltas can "
        "be computed only with these weights (--base)"
        for kind in kinds
    )


def _scale_notes(modules: Iterable[ModulePlan]) -> tuple[str, ...]:
    counts = Counter(m.scale.note for m in modules if m.scale.note)
    return tuple(f"{note} ({counted(n, 'module')})" for note, n in counts.items())


def _conv1d_note(modules: Iterable[ModulePlan]) -> tuple[str, ...]:
    odd = [m.group.name for m in modules if m.layout.kind == "peft-conv1d"]
    if not odd:
        return ()
    return (
        f"PEFT computes no Kronecker product for a Conv1d with a dense w2; krona keeps its result ({abbreviated(odd)})",
    )


def _value_note(modules: Iterable[ModulePlan], vectors: Iterable[VectorPlan]) -> tuple[str, ...]:
    """Note on tensors that replace parameters: their difference needs the base weights."""
    count = sum(m.layout.kind == "value" for m in modules) + sum(v.key.is_value for v in vectors)
    if not count:
        return ()
    subject = "1 parameter is" if count == 1 else f"{count:,} parameters are"
    return (f"{subject} stored whole: what is added is the difference from the base weights (--base)",)


def _kept_names(match: BaseMatch, vectors: Sequence[VectorPlan]) -> tuple[str, ...]:
    return (KEPT_NAMES,) if match.base is None and (match.places or vectors) else ()
