"""How a file will be read, before any tensor is: the layout, the scale and the layers of each module. Torch-free.

`krona inspect` shows the plan; `read` carries it out. A module that cannot be read is set aside with its error, and
`refuse` decides which of those errors stop the reading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from krona_hub.bases.base import COMPONENTS
from krona_hub.checkpoints.header import FLOATS
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
)
from krona_hub.formats.known.format import Format
from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.formats.parsing.base_match import Landing, Placements, land
from krona_hub.formats.parsing.keys import ModuleTensors, split_key
from krona_hub.formats.parsing.module_layout import ModuleLayout, layout_of
from krona_hub.formats.parsing.scales import ModuleScale, ScaleConfig, config_scale, tensor_scale

FORGIVABLE = (IncompleteError, UnsupportedError, BaseMismatchError)  # what --allow-missing consents to


@dataclass(frozen=True)
class ModulePlan:
    """How one module of a file is read."""

    group: ModuleTensors
    layout: ModuleLayout
    scale: ModuleScale
    places: Placements  # none where the base is unknown


@dataclass(frozen=True, eq=False)
class ReadPlan:
    """How a file is read."""

    file: AdapterFile
    format: str  # a name of FORMATS
    scale_rule: str
    landing: Landing
    modules: tuple[ModulePlan, ...]
    aside: Mapping[str, KronaError]  # module or key -> why it is not read
    notes: tuple[str, ...]
    unplaced: KronaError | None = None  # why no base was found; then no module has a place

    @property
    def total(self) -> int:
        return len(self.modules) + len(self.aside)

    @property
    def matched(self) -> str:
        """The sentence that is always said.

        In full: "88 of 88 modules matched sd15".
        """
        landed = sum(bool(m.places) for m in self.modules)
        where = self.landing.base.name if self.landing.base else "by their own names" if landed else "any known base"
        return f"{landed} of {self.total} modules matched {where}"


def make_plan(file: AdapterFile, format: Format, component: str | None = None, *, lost: bool = False) -> ReadPlan:
    """The plan of `file` read by the rules of `format`; every problem of a module is in `aside`.

    Raises what concerns the file as a whole: a broken configuration, and no base or several, unless it may be `lost`:
    then its modules have no places, and a note says why.
    """
    layouts, scales, aside = measure(file, format)
    landing, unplaced = _landing(file, layouts, format, component)
    if unplaced is not None and not lost:
        raise unplaced
    aside |= {**landing.problems, **_conflicts(landing)}
    modules = tuple(
        ModulePlan(group, layouts[group.name], scales[group.name], landing.places.get(group.name, ()))
        for group in file.keys.modules
        if group.name in layouts and group.name not in aside
    )
    notes = (
        *([str(unplaced)] if unplaced else []),
        *format.notes(file),
        *_scale_notes(modules),
        *_conv1d_note(modules),
        *_uncovered(landing),
        *_extras(file),
    )
    return ReadPlan(file, format.name, format.scale, landing, modules, aside, notes, unplaced)


def measure(
    file: AdapterFile, format: Format
) -> tuple[dict[str, ModuleLayout], dict[str, ModuleScale], dict[str, KronaError]]:
    """The layout and the scale of each module, whatever base they are for, and the modules that have none, and why."""
    aside = _leftovers(file)
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
            aside[group.name] = error
    return layouts, scales, aside


def _leftovers(file: AdapterFile) -> dict[str, KronaError]:
    """Keys and modules that no grammar of ours explains."""
    keys = file.keys
    found: dict[str, KronaError] = {}
    for name, algorithm in (keys.foreign or {}).items():
        found[name] = UnsupportedError(
            f"it is {algorithm}, no Kronecker or low-rank product.", fix="--allow-missing reads the other modules."
        )
    for key in keys.unknown:
        found[key] = IncompleteError("this key belongs to nothing known.", fix="--allow-missing leaves it out.")
    for name in keys.orphans:
        found[name] = IncompleteError("it has an alpha or a magnitude, and no delta.", fix="Save the adapter again.")
    return found


def _alphas(file: AdapterFile) -> dict[str, float]:
    """Module -> its stored alpha, wherever that is one plain number."""
    keys = {m.name: m.parts["alpha"] for m in file.keys.modules if "alpha" in m.parts}
    tensors = file.header.tensors
    sound = {name: key for name, key in keys.items() if tensors[key].numel == 1 and tensors[key].dtype in FLOATS}
    values = read_scalars(file.header, sound.values())
    return {name: values[key] for name, key in sound.items()}


def _scale(
    group: ModuleTensors, layout: ModuleLayout, alpha: float | None, configs: Mapping[str, ScaleConfig]
) -> ModuleScale:
    """By the configuration of its component, unless the module has an alpha of its own (OneTrainer)."""
    path = group.name.removeprefix("base_model.model.")
    component, _, rest = path.partition(".")
    if component in COMPONENTS and component in configs:
        config: ScaleConfig | None = configs[component]
        path = rest
    else:
        config = configs.get("")
    if alpha is not None or config is None or layout.kind in ("dense", "cdka"):
        return tensor_scale(layout, alpha)
    return config_scale(config, path, layout)


def _landing(
    file: AdapterFile, layouts: Mapping[str, ModuleLayout], format: Format, component: str | None
) -> tuple[Landing, KronaError | None]:
    """Where the modules land, or why that is not known."""
    nowhere = Landing(None, (), {}, {})
    if not layouts:
        return nowhere, None
    try:
        return _land(file, layouts, format, component), None
    except (UnknownBaseError, AmbiguousError, BaseMismatchError) as error:
        return nowhere, error


def _land(file: AdapterFile, layouts: Mapping[str, ModuleLayout], format: Format, component: str | None) -> Landing:
    if format.land is not None:
        return format.land(file, layouts)
    shapes = {name: layout.weight_shape for name, layout in layouts.items()}
    return land(shapes, file.metadata, file.base, component or file.component)


def _conflicts(landing: Landing) -> dict[str, KronaError]:
    """Modules that land where another one did."""
    owner: dict[str, str] = {}
    found: dict[str, KronaError] = {}
    for name, places in landing.places.items():
        taken = next((owner[p.layer] for p in places if p.layer in owner), None)
        if taken:
            found[name] = ConflictError(
                f"it adapts the same layer as {taken}.", fix="The file holds two adapters; keep one of the two."
            )
        owner |= {p.layer: name for p in places}
    return found


def refuse(plan: ReadPlan, allow_missing: bool) -> None:
    """Raise the first error that stops the reading: any that --allow-missing does not cover, or all modules gone."""
    refuse_unreadable(plan)
    if plan.aside and not allow_missing:
        raise _summary(plan.aside, plan)
    if not plan.modules:
        raise _summary(plan.aside, plan) if plan.aside else IncompleteError("it adapts nothing.", fix="Is it empty?")


def refuse_unreadable(plan: ReadPlan) -> None:
    """Raise the first error that --allow-missing does not cover."""
    hard = {name: e for name, e in plan.aside.items() if not isinstance(e, FORGIVABLE)}
    if hard:
        raise _summary(hard, plan)


def _summary(problems: Mapping[str, KronaError], plan: ReadPlan) -> KronaError:
    """The first problem, with the number and the names of others of its kind."""
    name, error = next(iter(problems.items()))
    alike = [n for n, e in problems.items() if type(e) is type(error)]
    fix = error.fix
    if isinstance(error, FORGIVABLE) and plan.modules and "--allow-missing" not in fix:
        fix = f"{fix} --allow-missing reads the other {len(plan.modules)}.".strip()
    where = name if len(alike) == 1 else f"{len(alike)} of {plan.total} modules ({abbreviated(alike)}): {name}"
    return type(error)(f"{where}: {error.cause}", fix=fix)


def _scale_notes(modules: Iterable[ModulePlan]) -> tuple[str, ...]:
    counts = Counter(m.scale.note for m in modules if m.scale.note)
    return tuple(f"{note} ({n} module{'s' if n > 1 else ''})" for note, n in counts.items())


def _conv1d_note(modules: Iterable[ModulePlan]) -> tuple[str, ...]:
    odd = [m.group.name for m in modules if m.layout.kind == "peft-conv1d"]
    if not odd:
        return ()
    return (
        f"PEFT makes no proper Kronecker product for a Conv1d with a whole w2; its result is kept ({abbreviated(odd)})",
    )


def _extras(file: AdapterFile) -> tuple[str, ...]:
    """Differences of biases and norms are no deltas of weights: they are kept, and nothing applies them."""
    count = sum(split_key(key) is not None for key in file.keys.extras)
    return (f"{count} differences of biases or norms are kept in extras, and are not applied",) if count else ()


def _uncovered(landing: Landing) -> tuple[str, ...]:
    if landing.base is not None or not landing.places:
        return ()
    return ("no known base has these names and shapes; layers are named as the file names them",)
