"""How many numbers an adapter has, before anybody trains it, and how many a file has. No weights, no torch.

KronA a1xa2, K terms    K · (a1·a2 + out·in / (a1·a2))     per layer; in = channels · k… for a convolution
LoKr factor f, full     a·c + b·d·k…                       (a, b) and (c, d): the factors of out and of in
LoKr factor f, rank r   a·c + r·(b + d·k…)                 where r < max(b, d)/2, else full
LoRA rank r             r · (out + in)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from krona_hub.accounting.costs import AdapterKind, adapter_kinds, lora_parameters
from krona_hub.bases import catalogue, loading
from krona_hub.bases.base import Base
from krona_hub.bases.families import FAMILIES
from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.bases.target_sets import choose, sets_of
from krona_hub.errors import ShapeError, UsageError
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.description import Description, ModuleInfo

BOTH = "all"  # as a component: every one of the base
TEXT = "text"  # as a component: every text encoder


@dataclass(frozen=True)
class CountRow:
    """The size of one adapter."""

    method: str
    parameters: int
    modules: int  # layers counted
    lora_rank: float  # the rank of a LoRA on the same layers with as many parameters
    undivided: tuple[str, ...] = ()  # layers that the shape does not divide; they are not counted

    @property
    def bytes_fp16(self) -> int:
        return 2 * self.parameters


@dataclass(frozen=True)
class ComponentCount:
    """A component of the base that is adapted."""

    component: str
    modules: int
    weights: int  # numbers in the weights of those modules
    total_parameters: int | None = None  # of the whole component, where the catalogue knows it
    config_status: str | None = None  # how far the catalogue's configuration is checked
    total_status: str | None = None

    @property
    def checked(self) -> str:
        """How far the catalogue's entry is checked, in words; empty for a base read from a folder."""
        if not (self.config_status and self.total_status):
            return ""
        config, total = catalogue.CONFIG_STATUS[self.config_status], catalogue.TOTAL_STATUS[self.total_status]
        return f"configuration {self.config_status} ({config}), total {self.total_status} ({total})"


@dataclass(frozen=True)
class Accounting:
    """What `krona params` prints."""

    base: str
    targets: str  # a named set or a regular expression
    parts: tuple[ComponentCount, ...]
    rows: tuple[CountRow, ...]
    target_sets: tuple[str, ...]  # names that `targets` could have been
    uncovered: tuple[str, ...] = ()  # parts of the pipeline that the base does not list

    @property
    def modules(self) -> int:
        return sum(part.modules for part in self.parts)


def account(
    base: Base | str,
    *,
    targets: str = "attn",
    component: str | Sequence[str] | None = None,
    shapes: Iterable[str] = ("64x4", "64x8", "64x16"),
    factors: Iterable[int] = (8, 16),
    ranks: Iterable[int] = (4, 16),
    terms: int = 1,
    kernels: bool = True,
) -> Accounting:
    """Sizes of KronA, LoKr and LoRA adapters of a base.

    `targets` is a named set or a regular expression; `component` one or several component names, `text` or `all`
    (None: the denoiser). `kernels=False` leaves convolutions wider than 1×1 out. Factors of -1 are LyCORIS's
    choice, near the square root.

    >>> [(row.method, row.parameters) for row in account("sdxl", shapes=["64x4"], factors=[], ranks=[4]).rows]
    [('KronA by width', 1443840), ('KronA 64x4', 3874560), ('LoRA rank 4', 5806080)]
    """
    base = base if isinstance(base, Base) else loading.load_base(base)
    chosen = {c: _layers(base, c, targets, kernels) for c in components_of(base, component)}
    layers = {name: module for modules in chosen.values() for name, module in modules.items()}
    rows = tuple(_row(method, layers) for method in adapter_kinds(shapes, factors, ranks, terms))
    parts = tuple(_part(base, component, modules) for component, modules in chosen.items())
    return Accounting(base.name, targets, parts, rows, _set_names(base, chosen), base.uncovered)


def account_file(
    source: str | Path,
    *,
    base: Base | str | None = None,
    component: str | None = None,
    shapes: Iterable[str] = ("64x4", "64x8", "64x16"),
    factors: Iterable[int] = (8, 16),
    ranks: Iterable[int] = (4, 16),
    terms: int = 1,
) -> Accounting:
    """The size of an adapter file, in the first row, and what other forms on the same layers would have.

    A module of the file counts as one layer, fused ones too; headers are read, nothing else.
    """
    about = describe(source, base=base, component=component)
    layers = {m.name: ModuleSpec(m.weight_shape) for m in about.modules}
    own = CountRow(f"this file, {about.format}", about.parameters, len(layers), lora_rank_of(about))
    rows = (own, *(_row(method, layers) for method in adapter_kinds(shapes, factors, ranks, terms)))
    return Accounting(about.base or "unknown", f"the layers of {about.path.name}", _file_parts(about.modules), rows, ())


def lora_rank_of(about: Description) -> float:
    """The rank of a LoRA on the layers of a file that would have as many parameters; 0 for no layers."""
    return _as_lora(about.parameters, [ModuleSpec(m.weight_shape) for m in about.modules])


def _file_parts(modules: Iterable[ModuleInfo]) -> tuple[ComponentCount, ...]:
    """What the file adapts, per component; `unknown` where no base explains it."""
    owned: dict[str, list[ModuleInfo]] = {}
    for module in modules:
        owned.setdefault(module.layers[0].partition(".")[0] if module.layers else "unknown", []).append(module)
    return tuple(ComponentCount(c, len(group), sum(prod(m.weight_shape) for m in group)) for c, group in owned.items())


def components_of(base: Base, wanted: str | Sequence[str] | None) -> tuple[str, ...]:
    """The components that a wish means, in the order of the base. Raises UsageError for one that is not there."""
    names = [wanted] if isinstance(wanted, str) else list(wanted or [base.denoiser or BOTH])
    groups = {BOTH: tuple(base.components), TEXT: base.text_encoders}
    chosen = {c for name in names for c in groups.get(name, (name,))}
    missing = sorted(chosen - set(base.components))
    if missing or not chosen:
        raise UsageError(
            f"{base.name} has no component {' or '.join(missing) or TEXT}.",
            fix=f"It has {', '.join(base.components)}; {TEXT} means every text encoder, {BOTH} everything.",
        )
    return tuple(c for c in base.components if c in chosen)


def _layers(base: Base, component: str, wanted: str, kernels: bool) -> dict[str, ModuleSpec]:
    picked = choose(base, component, wanted)
    return {name: module for name, module in picked.items() if kernels or not module.has_kernel}


def _set_names(base: Base, components: Iterable[str]) -> tuple[str, ...]:
    """The named sets that every one of the components has."""
    names = [[s.name for s in sets_of(base.components[c])] for c in components]
    return tuple(name for name in names[0] if all(name in others for others in names))


def _part(base: Base, component: str, layers: Mapping[str, ModuleSpec]) -> ComponentCount:
    part = ComponentCount(component, len(layers), sum(prod(module.shape) for module in layers.values()))
    if base.family != base.name:  # read from a folder: the catalogue says nothing about it
        return part
    entry = catalogue.component(FAMILIES[base.name].components[component])
    return replace(
        part,
        total_parameters=entry.total_parameters,
        config_status=entry.config_status,
        total_status=entry.total_status,
    )


def _row(method: AdapterKind, layers: Mapping[str, ModuleSpec]) -> CountRow:
    costs = {module: _cost(method, module) for module in set(layers.values())}  # few sizes, many layers
    counted = [module for module in layers.values() if costs[module] is not None]
    undivided = tuple(name for name, module in layers.items() if costs[module] is None)
    total = sum(costs[module] or 0 for module in counted)
    return CountRow(method.label, total, len(counted), _as_lora(total, counted), undivided)


def _as_lora(parameters: int, modules: Iterable[ModuleSpec]) -> float:
    """The rank of the LoRA of the same size; 0 for no layers."""
    per_rank = sum(lora_parameters(module, 1) for module in modules)
    return parameters / per_rank if per_rank else 0.0


def _cost(method: AdapterKind, module: ModuleSpec) -> int | None:
    """None where the form does not fit."""
    try:
        return method.cost(module)
    except ShapeError:
        return None


# --- the forms -------------------------------------------------------------------------------------------------------
